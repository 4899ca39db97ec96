"""What a model costs, against models that are really built and figures that were published."""

import pytest
import torch

from plmtune.devices import costs
from plmtune.devices.costs import ModelShape
from plmtune.errors import UserError
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Quantized, install
from plmtune.registry import Component, component


def small_plm(**settings: object) -> Decoder:
    attention = component("attention", "mla", kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    made: Decoder = plm(
        96,
        attention=attention,
        ffn=component("ffn", "squared_relu", hidden_dim=128),
        **{"embed_dim": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": 64} | settings,  # type: ignore[arg-type]
    )
    return made


def small_llama(**settings: object) -> Decoder:
    made: Decoder = llama(
        96,
        attention=component("attention", "gqa", num_kv_heads=2),
        ffn=component("ffn", "swiglu", hidden_dim=128),
        **{"embed_dim": 64, "num_layers": 3, "num_heads": 4, "max_seq_len": 64} | settings,  # type: ignore[arg-type]
    )
    return made


@pytest.fixture(scope="module")
def paper() -> ModelShape:
    with torch.device("meta"):
        return ModelShape.of(plm(151936))


class TestPaper:
    """PLM-1.8B, by the figures of arXiv 2503.12167 and of its published files."""

    def test_parameters(self, paper: ModelShape) -> None:
        assert (paper.parameters, paper.non_embedding_parameters) == (1_825_458_176, 1_514_293_248)

    def test_llama_cpp_expands_the_cache_and_we_do_not(self, paper: ModelShape) -> None:
        assert costs.cache_bytes(paper, "plmtune", 4096) == 144 * 2**20
        assert costs.cache_bytes(paper, "llama.cpp", 4096) == 1280 * 2**20

    def test_q4_k_m_is_the_published_file_less_its_tokenizer(self, paper: ModelShape) -> None:
        assert 0 < 1_182_708_992 - costs.weights(paper, "llama.cpp", "q4_k_m").file < 7e6

    def test_absorbed_decoding_takes_3_4_times_the_work_of_expanded(self, paper: ModelShape) -> None:
        ratio = costs.attention_flops(paper, "plmtune", 1) / costs.attention_flops(paper, "llama.cpp", 1)
        assert ratio == pytest.approx(3.4, abs=0.01)


class TestAgainstRealModels:
    @pytest.mark.parametrize("make", [small_plm, small_llama])
    @pytest.mark.parametrize("scheme", ["fp32", "bf16", "int8", "int4"])
    def test_bytes_are_those_of_the_tensors(self, make: object, scheme: str) -> None:
        model, model_shape = make(), ModelShape.of(make())  # type: ignore[operator]
        if scheme not in costs.FLOATS:
            install(model, Component("quantization", scheme)(model=model))
        model = model.to(torch.float32 if scheme == "fp32" else torch.bfloat16)
        held = sum(tensor.nbytes for tensor in model.state_dict().values())
        assert costs.weights(model_shape, "plmtune", scheme).file == held

    @pytest.mark.parametrize("make", [small_plm, small_llama])
    @pytest.mark.parametrize("scheme", ["bf16", "int8", "int4"])
    def test_memory_is_that_of_a_prepared_model(self, make: object, scheme: str) -> None:
        model, model_shape = make().to(torch.bfloat16), ModelShape.of(make())  # type: ignore[operator]
        if scheme != "bf16":
            install(model, Component("quantization", scheme)(model=model))
            model = model.to(torch.bfloat16)
        for name, module in model.named_modules():
            if name.endswith("kv_b_proj") and isinstance(module, Quantized):
                module.keep_dense()  # as `prepack` does
        held = sum(tensor.nbytes for tensor in model.state_dict().values())
        held += sum(m.dense.nbytes for m in model.modules() if isinstance(m, Quantized) and m.dense is not None)
        assert costs.weights(model_shape, "plmtune", scheme).memory == held

    @pytest.mark.parametrize("make", [small_plm, small_llama])
    def test_cache_is_that_of_the_model(self, make: object) -> None:
        model = make()  # type: ignore[operator]
        cache = model.to(torch.bfloat16).new_cache(1, 10)
        assert costs.cache_bytes(ModelShape.of(model), "plmtune", 10) == cache.nbytes

    @pytest.mark.parametrize("make", [small_plm, small_llama])
    @pytest.mark.parametrize(("runtime", "scheme"), [("plmtune", "int4"), ("llama.cpp", "q4_k_m")])
    def test_one_layer_repeated_costs_what_many_do(self, make: object, runtime: str, scheme: str) -> None:
        many, one = ModelShape.of(make(num_layers=8)), ModelShape.of(make(num_layers=1))  # type: ignore[operator]
        again = one.repeated(8)
        assert costs.weights(again, runtime, scheme) == costs.weights(many, runtime, scheme)
        assert (again.parameters, again.attention) == (many.parameters, many.attention)

    def test_a_quantized_model_is_known_by_its_formats(self) -> None:
        model = small_plm()
        expected = costs.weights(ModelShape.of(small_plm()), "plmtune", "int4")
        install(model, Component("quantization", "int4")(model=model))
        model_shape = ModelShape.of(model)
        assert costs.weights(model_shape, "plmtune", costs.STORED) == expected
        with pytest.raises(UserError, match="quantized already"):
            costs.weights(model_shape, "plmtune", "int8")

    def test_an_untied_embedding_is_held_but_not_read(self) -> None:
        tied, untied = (
            costs.weights(ModelShape.of(small_llama(tie_embeddings=tie)), "plmtune", "bf16") for tie in (True, False)
        )
        assert untied.file - tied.file == 2 * 96 * 64
        assert untied.read == tied.read


class TestSchemes:
    def test_each_goes_to_the_runtimes_that_have_it(self) -> None:
        pairs = costs.check_schemes(["bf16", "int4", "q8_0"], costs.RUNTIMES)
        assert pairs == [("plmtune", "bf16"), ("plmtune", "int4"), ("llama.cpp", "bf16"), ("llama.cpp", "q8_0")]

    def test_an_unknown_one_is_asked_about(self) -> None:
        with pytest.raises(UserError, match=r"no scheme q4_1k\. Did you mean q4_1"):
            costs.check_schemes(["q4_1k"], ["llama.cpp"])
        with pytest.raises(UserError, match=r"no runtime llamacpp\. Did you mean llama\.cpp"):
            costs.check_schemes(["bf16"], ["llamacpp"])

"""What a format makes of a model, said from its config alone."""

from typing import Any

import pytest

from plmtune.export.lint import Finding, lint, lint_deploy, matrices, stored_type
from plmtune.models.families import by_model_type
from plmtune.models.gguf_layout import kv_heads


def plm_config(**changes: Any) -> dict[str, Any]:
    """PLM-1.8B."""
    attention = {
        "component": "mla",
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_theta": 1e5,
    }
    return {
        "component": "plm",
        "vocab_size": 151936,
        "attention": attention,
        "ffn": {"component": "squared_relu", "hidden_dim": 8192},
        "norm": {"component": "rms_norm", "eps": 1e-6},
        "embed_dim": 2048,
        "num_layers": 32,
        "num_heads": 16,
        "max_seq_len": 4096,
        "tie_embeddings": True,
    } | changes


def llama_config(**changes: Any) -> dict[str, Any]:
    """SmolLM2-135M."""
    attention = {"component": "gqa", "num_kv_heads": 3, "head_dim": None, "rope_interleaved": False, "bias": False}
    return plm_config(
        attention=attention,
        ffn={"component": "swiglu", "hidden_dim": 1536},
        vocab_size=49152,
        embed_dim=576,
        num_layers=30,
        num_heads=9,
        max_seq_len=8192,
    ) | dict(changes)


def texts(found: list[Finding], level: str) -> str:
    return "\n".join(finding.text for finding in found if finding.level == level)


class TestMatrices:
    def test_are_all_that_the_paper_counts(self) -> None:
        norms = 32 * (2048 + 2048 + 512) + 2048
        counted = sum(rows * width * count for rows, width, count in matrices(plm_config()).values())
        assert counted + norms == 1_825_458_176

    def test_of_smollm2_with_its_heads(self) -> None:
        found = matrices(llama_config())
        assert found["k_proj"] == (192, 576, 30) and found["gate_proj"] == (1536, 576, 30)
        assert "output" in matrices(llama_config(tie_embeddings=False))
        assert kv_heads(llama_config(attention={"component": "mha"})) == 9


class TestGguf:
    def test_plm_is_accepted_with_a_warning_about_its_cache(self) -> None:
        found = lint(plm_config(), "gguf", ("Q4_K_M", "q8_0"))
        assert texts(found, "refused") == ""
        assert "expanded (320.00 KiB a token, 1.25 GiB at 4,096 tokens), 8.9 times the latent's 36.00 KiB" in texts(
            found, "warning"
        )
        assert "flash attention: switch it off" in texts(found, "warning")
        assert "rows of" not in texts(found, "warning")  # all are multiples of 256

    def test_plm_as_deepseek2_caches_the_latent(self) -> None:
        found = lint(plm_config(max_seq_len=32768), "gguf", ("Q4_K_M",), "deepseek2")
        assert texts(found, "refused") == "" and "expanded" not in texts(found, "warning")
        assert "cache takes 36.00 KiB a token, 1.12 GiB at 32,768 tokens" in texts(found, "warning")
        assert "attn_k_b has rows of 128 numbers, no multiple of 256: Q4_K_M stores Q5_0" in texts(found, "warning")
        (refused,) = lint(llama_config(), "gguf", (), "deepseek2")
        assert refused.level == "refused" and "--as deepseek2 is for a PLM" in refused.text

    def test_rows_of_no_256_name_what_they_become_and_cost(self) -> None:
        q4, head = lint(llama_config(), "gguf", ("Q4_K_M",))
        assert q4.text.startswith("q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj have rows of 576 numbers")
        # 30 layers x (2 x 192 + 2 x 576 + 2 x 1536) x 576 numbers at 5.5 for 4.5 bits
        assert q4.text.endswith("no multiple of 256: Q4_K_M stores Q5_0 instead of Q4_K, 9.49 MiB more.")
        assert "tok_embeddings has rows of 576" in head.text and "stores Q8_0 instead of Q6_K" in head.text

    @pytest.mark.parametrize(
        ("kind", "width", "head", "expected"),
        [
            ("Q4_K_M", 256, False, "Q4_K"),
            ("Q4_K_M", 288, False, "Q5_0"),
            ("Q4_K_M", 36, False, "F16"),
            ("Q4_K_M", 256, True, "Q6_K"),
            ("Q4_0", 64, True, "Q8_0"),
            ("Q8_0", 48, False, "F16"),
            ("BF16", 7, False, "BF16"),
            ("IQ4_NL", 32, False, "IQ4_NL"),
        ],
    )
    def test_type_of_a_row(self, kind: str, width: int, head: bool, expected: str) -> None:
        assert stored_type(kind, width, head=head) == expected

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (plm_config(ffn={"component": "geglu", "hidden_dim": 8}), "no architecture with mla, geglu, rms_norm"),
            (
                llama_config(
                    ffn={"component": "geglu", "hidden_dim": 8}, norm={"component": "layer_norm", "eps": 1e-5}
                ),
                "with gqa, geglu, layer_norm",
            ),
            (plm_config(tie_embeddings=False), "Use --as deepseek2 or --to hf --as deepseek"),
            (plm_config(attention={"component": "mine"}), "no architecture with attention=mine. It has gqa, mha, mla."),
        ],
    )
    def test_parts_that_it_lacks_are_refused_by_name(self, config: dict[str, Any], message: str) -> None:
        found = lint(config, "gguf", ("F16",))
        assert [finding.level for finding in found] == ["refused"] and message in found[0].text

    def test_a_long_context_whose_cache_is_large(self) -> None:
        found = lint(llama_config(max_seq_len=131072), "gguf")
        assert "cache takes 22.50 KiB a token, 2.81 GiB at 131,072 tokens: give it a shorter context" in texts(
            found, "warning"
        )
        assert "cache takes" not in texts(lint(llama_config(), "gguf"), "warning")

    def test_odd_heads_and_vocabularies(self) -> None:
        attention = plm_config()["attention"] | {"v_head_dim": 100}
        found = texts(lint(plm_config(attention=attention, vocab_size=151_646), "gguf"), "warning")
        assert "Heads have 192 numbers of keys and 100 of values" in found
        assert "vocabulary of 151,646 rows is no multiple of 32" in found and "151,648 rows would do" in found


class TestOthers:
    def test_hf_has_no_plm_but_as_deepseek(self) -> None:
        assert "--as deepseek" in texts(lint(plm_config(), "hf"), "warning")
        assert lint(llama_config(), "hf") == []

    def test_hf_lacks_the_same_parts_that_the_export_refuses(self) -> None:
        capped = llama_config()["attention"] | {"soft_cap": 5.0}
        assert "no model of gqa, swiglu and rms_norm with attention.soft_cap=5.0. They have plm, llama" in texts(
            lint(llama_config(attention=capped), "hf"), "refused"
        )
        gelu = {"component": "gelu", "hidden_dim": 8}
        assert "no model of gqa, gelu and rms_norm. They" in texts(lint(llama_config(ffn=gelu), "hf"), "refused")

    def test_hf_says_which_families_need_their_authors_code(self) -> None:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        lacking = [name for name, family in by_model_type().items() if not family.in_transformers]
        assert lacking == [name for name in by_model_type() if name not in CONFIG_MAPPING_NAMES] == ["plm", "minicpm"]
        minicpm = llama_config(component="minicpm", depth_scale=1.4)
        assert "does not know the model_type minicpm itself" in texts(lint(minicpm, "hf"), "warning")

    def test_executorch_takes_a_plm(self) -> None:
        assert lint(plm_config(), "executorch", ("int8_dynamic", "int8_dynamic_int4")) == []

    def test_executorch_keeps_rows_of_no_32_in_8_bits(self) -> None:
        found = lint(plm_config(embed_dim=2040), "executorch", ("int8_dynamic_int4",))
        assert "the rows of q_proj (2,040), kv_a_proj (2,040), up_proj (2,040) stay in 8 bits" in texts(
            found, "warning"
        )

    def test_executorch_has_only_the_parts_that_it_knows(self) -> None:
        found = lint(plm_config(ffn={"component": "mine"}), "executorch")
        assert "no mla with mine" in texts(found, "refused")

    def test_a_model_to_be_trained_hears_of_each_once(self) -> None:
        found = lint_deploy(plm_config(vocab_size=151_646))
        assert len(found) == len(set(found)) and "vocabulary of 151,646" in texts(found, "warning")

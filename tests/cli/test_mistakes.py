"""Deliberate mistakes: each ends with exit code 2 and a sentence that names it, and leaves nothing behind.

A line is a command as a person types it, and what the sentence must hold.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from in_process import run, save_small

FILES = {
    "d.txt": "hello world. " * 500,
    "empty.txt": "",
    "broken.yaml": "a: [",
    "empty.yaml": "",
    "list.yaml": "- 1",
    "latin.yaml": b"name: \xe9",
    "twice.yaml": "seed: 1\nseed: 2\n",
    "typo.yaml": "optimizer: {lerning_rate: 1}",
    "wrongtype.yaml": "seq_len: abc",
    "badgroup.yaml": "model: plmm",
    "hydra.yaml": "hydra: {run: {dir: x}}",
    "sft.yaml": "recipe: sft",
    "target.yaml": "optimizer: {_target_: os.system}",
    "preset.yaml": "defaults: [plm, _self_]\nnum_layers: 3",
    "demo.yml": "recipe: pretrain\n",
    "good.yaml": "model: {component: plm_tiny, ffn: swiglu}\noptimizer: adamw\nlogger: [jsonl, tensorboard]\n",
    "x.py": "",
    "two.yaml": "logger: [jsonl, {component: wandb, project: x}]",
    "none.yaml": "logger: []",
    "comma.yaml": "optimizer: {lr: '0,001'}",
    "bad.jsonl": "broken\n",
    "my (text).txt": "hello world. " * 500,
    "chats.jsonl": '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n',
    "pairs.jsonl": '{"prompt": "q", "chosen": "a", "rejected": "b"}\n',
    "fake.gguf": "GGUF....",
}

COMMANDS = [
    ("trian demo", "There is no command trian. Known: bench, card, chat"),
    ("pretrain", "There is no command pretrain. pretrain is a config: plmtune"),
    ("plm_20m", "There is no command plm_20m. plm_20m is a preset of the"),
    ("resume", "There is no unfinished run under runs/ to resume. List the"),
    ("resume nowhere", "nowhere is not a run directory: it has no config.yaml"),
    ("resume m", "m is not a run directory: it has no config.yaml. There are"),
    ("resume demo", "demo is not a run directory: it has no config.yaml. There"),
    ("checkpoints nowhere", "nowhere holds no checkpoints. Give a run"),
    ("checkpoints m", "m holds no checkpoints. Give a run (runs/demo/latest), or"),
    ("runs nowhere", "There is no directory nowhere. Runs are in runs/, where"),
    ("ls nosuch", "There is no group nosuch. Known: attention, data, devices"),
    ("ls runs", "There is no group runs. runs is a command: plmtune runs"),
    ("ls plm_20m", "There is no group plm_20m. plm_20m is a preset of the group"),
    ("cp nosuch x.yaml", "There is no config, preset or recipe nosuch. See: plmtune"),
    ("cp pretrain", "plmtune cp: TARGET is missing. Usage: plmtune cp [OPTIONS] NAME TARGET"),
    ("cp pretrain d.txt", "d.txt: pretrain is a .yaml file. Give the copy the same"),
    ("cp pretrain nodir/x.yaml", "nodir/x.yaml: the folder nodir does not exist"),
    ("cp pretrain twice.yaml", "twice.yaml exists. Choose another name, or pass --overwrite"),
    ("cp recipes/pretrain x.yaml", "x.yaml: recipes/pretrain is a .py file. Give the copy the"),
]

CONFIGS = [
    ("validate demo optimzer.lr=1", "override optimzer.lr=1, key optimzer: unknown. Did you mean optimizer?"),
    ("validate demo_sft peft.rank=0", "peft has no component. Choose one first: peft=NAME"),
    ("validate demo model/ffn=geglu", "has no option geglu. Known: squared_relu, swiglu."),
    ("validate demo data=files 'data.paths=[{path: x}]'", "key data.paths[0]: a table where one value is needed"),
    ("validate demo data=files data.paths=[{path: x}]", "'data.paths=[{path: x}]'"),
    ("validate demo phases=[{name: a, tokenz: 1M}]", "'phases=[{name: a, tokenz: 1M}]'"),
    ("validate demo 'phases=[{name: a, tokenz: 1M}]'", "key tokenz: unknown. Did you mean tokens?"),
    ("validate demo guard={spike: 3}", "'guard={spike: 3}'"),
    ("validate demo 'guard={spike: 3}'", "key guard.spike: unknown. Did you mean guard.spike_factor?"),
    ("validate demo data.paths=[my file.txt]", "'data.paths=[my file.txt]'"),
    ("validate demo data=files data.paths=[nowhere.txt]", "There is no file nowhere.txt"),
    ("validate demo data=files data.paths=[]", "data files: paths is empty. Give files, folders or globs"),
    ("validate demo data=mix", "key data: mix needs at least one source"),
    ("validate demo data=files data.paths=[d.txt] data.encoding=nosuch", "encoding 'nosuch' is unknown to Python"),
    ("validate demo data=files data.paths=[d.txt] data.separator=''", "key data: separator is the empty text"),
    ("validate demo data=docstrings", "holds conversations; this run takes plain text"),
    ("run demo data=docstrings --dry-run", "holds conversations; this run takes plain text"),
    ("run pretrain data=docstrings phases=[{name: a, steps: 2}]", "'phases=[{name: a, steps: 2}]'"),
    ("validate demo runtime.device=tpu", "device=tpu is no device. Use auto, cpu, cuda or cuda:0"),
    ("validate demo init_from=nowhere", "There is no nowhere"),
    ("validate demo 'phases=[{name: a, tokens: 1E99M}]'", "is more than 64 bits can count"),
    ("validate demo num_workers=100000", "key num_workers: must be at least 0 and at most 256, not 100000"),
    ("validate demo logger=several", "key logger: several needs at least one logger"),
    ("validate demo_sft loss=dpo", "key loss: dpo is not for this recipe, which takes cross_entropy, sft_refine"),
    ("validate demo_sft peft=lora peft.rank=0", "key peft: rank (0) must be at least 1"),
    ("validate demo_sft chat.template=nosuch.jinja", "nosuch.jinja is neither a chat template's name nor a file"),
    ("validate demo_sft eval.tasks=[nosuchtask]", "key eval.tasks: There is no task nosuchtask"),
    ("validate demo_sft scheduler.warmup=90% scheduler.decay=90%", "steps exceed the run's"),
    ("validate demo_dpo loss=cross_entropy", "key loss: cross_entropy is not for this recipe"),
    ("validate demo_dpo loss.beta=-1", "key loss: beta (-1.0) must be above 0"),
    ("validate demo_dpo rounds=1 selection.rules=[nosuch]", "rule has no component nosuch. Known: final_number"),
    ("validate demo_aries rounds=1 reward=reward_model reward.path=nowhere", "There is no nowhere"),
    ("validate demo --import ''", "takes the name of a Python module"),
    ("run", "plmtune run: NAME is missing. Usage: plmtune run [OPTIONS] NAME [FILE.yaml] [KEY=VALUE]..."),
    ("run pretrian", "There is no config pretrian. Did you mean pretrain?"),
    ("run plm_20m", "There is no config plm_20m. plm_20m is a preset of the"),
    ("run swiglu", "There is no config swiglu. swiglu is a component of the"),
    ("run preference", "There is no config preference. preference is a recipe"),
    ("run pi5", "There is no config pi5. pi5 is a device: plmtune plan"),
    ("run attention", "There is no config attention. attention is a group: plmtune"),
    ("run nothing.yaml", "nothing.yaml: no such file. Known: aries, demo,"),
    ("run nothing.py", "nothing.py: no such recipe file. Start from ours: plmtune"),
    ("run conf/demoo.yaml", "conf/demoo.yaml: no such file. Did you mean demo"),
    ("run demo optimizer.lr 3e-4", "'optimizer.lr' is neither a YAML file nor an override of"),
    ("run demo --lr 3e-4", "there is no option --lr. Keys of the config are given as KEY=VALUE"),
    ("run demo -lr=3", "there is no option -l. Keys of the config are given as KEY=VALUE"),
    ("run demo demo2.yaml", "demo2.yaml: no such file. Did you mean demo.yml?"),
    ("run preset.yaml", "preset.yaml: is a preset of the group model, not a config"),
    ("validate plm_20m", "There is no config plm_20m. plm_20m is a preset of the"),
    ("validate preset.yaml", "preset.yaml: is a preset of the group model, not a config"),
    ("validate", "plmtune validate: NAME is missing. Usage: "),
    ("validate demo broken.yaml", "broken.yaml, line 1: is not YAML that a config can hold"),
    ("validate demo empty.yaml", "empty.yaml: is empty. A config holds at least one key, such"),
    ("validate demo list.yaml", "list.yaml: holds a list, not keys and values"),
    ("validate demo latin.yaml", "latin.yaml: is not UTF-8 text (byte 6). Save it as UTF-8"),
    ("validate demo twice.yaml", "twice.yaml, line 2: is not YAML that a config can hold (the"),
    ("validate demo typo.yaml", "typo.yaml, key optimizer.lerning_rate: unknown. Did you"),
    ("validate demo wrongtype.yaml", "wrongtype.yaml, key seq_len: abc is not a whole number"),
    ("validate demo badgroup.yaml", "badgroup.yaml, key model: model has no option plmm. Did you"),
    ("validate demo hydra.yaml", "hydra.yaml, key hydra: Hydra's own settings are given on"),
    ("validate demo sft.yaml", "sft.yaml, key recipe: the file is for sft, and demo runs"),
    ("validate demo target.yaml", "target.yaml, key optimizer._target_: not allowed"),
    ("validate demo d.txt", "'d.txt' is neither a YAML file nor an override of the form"),
    ("validate demo optimizer.lerning_rate=1", "key optimizer.lerning_rate: unknown. Did you mean"),
    ("validate demo lr=1", "key lr: unknown. Did you mean optimizer.lr?"),
    ("validate demo optimizer.lr=fast", "key optimizer.lr: fast is not a number"),
    ("validate demo optimizer.lr=-1", "key optimizer: lr (-1.0) must be at least 0"),
    ("validate demo optimizer.lr=inf", "key optimizer.lr: must be a finite number, not inf"),
    ("validate demo optimizer.lr=nan", "key optimizer.lr: must be a finite number, not nan"),
    (
        "validate demo optimizer.lr=1,2",
        "override optimizer.lr=1,2: several values. As one number: optimizer.lr=1.2. To run",
    ),
    ("validate demo optimizer=adamm", "optimizer has no option adamm. Did you mean adamw?"),
    ("validate demo optimizer=[adamw,muon]", "key optimizer: takes the name of one component, not a list"),
    ("validate demo optimizer=null", "key optimizer: no component chosen. See: plmtune ls"),
    ("validate demo scheduler=wscd", "scheduler has no option wscd. Did you mean wsd or wsdc?"),
    ("validate demo scheduler.warmup=200%", "key scheduler: warmup (200%) is not a length: give steps"),
    ("validate demo scheduler.decay_shape=round", "key scheduler.decay_shape: 'round' is none of linear"),
    ("validate demo model=plm_tinny", "model has no option plm_tinny. Did you mean plm_tiny?"),
    ("validate demo model=swiglu", "model has no option swiglu. swiglu is a component of the"),
    ("validate demo model/fnn=swiglu", "key model/fnn: unknown. Did you mean model?"),
    ("validate demo model=nothing.yaml", "override model=nothing.yaml: no such file. A preset to"),
    ("validate demo optimizer=preset.yaml", "override optimizer=preset.yaml: preset.yaml is a preset of"),
    ("validate demo model.num_layers=0", "key model: num_layers (0) must be at least 1 and at most"),
    ("validate demo model.num_layers=2.5", "key model.num_layers: 2.5 is not a whole number"),
    ("validate demo model.attention.kv_lora_rank=-1", "key model: kv_lora_rank (-1) must be at least 1 and at most"),
    ("validate demo model.attention.component=gqa", "override model.attention.component=gqa: choose it as"),
    ("validate demo loss=dpo", "key loss: dpo is not for this recipe, which takes cross_entropy"),
    ("validate demo peft=lora", "demo has no key peft (it belongs to sft, preference)"),
    ("validate demo logger=wandbb", "logger has no option wandbb. Did you mean wandb?"),
    ("validate demo logger=[jsonl,jsonl]", "key logger: names jsonl twice"),
    ("validate demo logger.project=x", "logger is tensorboard, which has no key project; components"),
    ("validate demo data=nosuch", "data has no option nosuch. Known: conversations"),
    ("validate demo data.paths=[d.txt]", "data is stdlib, which has no key paths; components of data"),
    ("validate demo data=files data.paths=[a=b.txt]", "override data.paths=[a=b.txt]: cannot be understood. Quote"),
    (
        "validate demo data=files data.paths=[d.txt] data.format=xml",
        "key data.format: 'xml' is none of auto, text, jsonl, csv",
    ),
    ("validate demo tokenizer=nosuch", "tokenizer has no option nosuch. Known: bundled, byte, file"),
    ("validate demo tokenizer=file tokenizer.path=nothing", "Tokenizer file nothing does not exist or is no file"),
    ("validate demo phases=[]", "key phases: is empty, so nothing says how long to train"),
    ("validate demo phases=3", "key phases: needs a list. Write 'phases=[3]'"),
    ("validate demo seq_len=0", "key seq_len: must be at least 1 and at most 16,777,216, not 0"),
    ("validate demo seq_len=99999", "key seq_len: 99999 exceeds the model's max_seq_len (1024)"),
    ("validate demo seq_len=true", "key seq_len: True is not a whole number"),
    ("validate demo global_batch_size=0", "key global_batch_size: must be at least 1 and at most 16,777,216"),
    ("validate demo micro_batch_size=-1", "key micro_batch_size: must be at least 1 and at most 16,777,216"),
    ("validate demo max_grad_norm=-1", "key max_grad_norm: must be at least 0, not -1.0"),
    ("validate demo log_every=0", "key log_every: must be at least 1, not 0"),
    ("validate demo num_workers=-1", "key num_workers: must be at least 0 and at most 256, not -1"),
    ("validate demo seed=abc", "key seed: abc is not a whole number"),
    ("validate demo seed=null", "key seed: needs a value, not null"),
    ("validate demo name=a/b", "key name: must be one part of a path, as in runs/NAME, not"),
    ("validate demo guard=3", "key guard: needs a table of its keys"),
    ("validate demo guard.patience=0", "key guard.patience: must be at least 1, not 0"),
    ("validate demo runtime.precision=fp8", "key runtime.precision: 'fp8' is none of auto, bf16, fp32"),
    ("validate demo runtime.strategy=ddpp", "key runtime.strategy: 'ddpp' is none of auto, none, ddp"),
    ("validate demo runtime.timeout_minutes=0", "key runtime.timeout_minutes: must be above 0 and below"),
    ("validate demo checkpoint.keep=-1", "key checkpoint.keep: must be at least 0, not -1"),
    ("validate demo checkpoint.best_is=good", "key checkpoint.best_is: 'good' is none of lowest, highest"),
    ("validate demo validation.every=-1", "key validation.every: must be at least 0, not -1"),
    ("validate demo eval.tasks=nosuchtask", "key eval.tasks: There is no task nosuchtask"),
    ("validate demo sample.temperature=-1", "key sample.temperature: must be at least 0 and at most 100, not -1"),
    ("validate demo preparation.holdout=2", "key preparation.holdout: must be at least 0 and below 1"),
    ("validate demo preparation.holdout_by=luck", "key preparation.holdout_by: 'luck' is none of documents"),
    ("validate demo =3", "override =3: has no key. Write key=value"),
    ("validate demo a..b=3", "with the value in quotes"),
    ("validate demo run_dir=a(b", "override run_dir=a(b: cannot be understood. Quote it for"),
    ("validate demo hydra.run.dir=x", "override hydra.run.dir=x: not allowed. Hydra's settings"),
    ("validate demo optimizer._target_=os.system", "override optimizer._target_=os.system: not allowed"),
    ("validate demo name=${oc.env:HOME}", "key name: '${oc.env:HOME}': a config is saved with its run"),
    ("validate demo seq_len=${nothing}", "key seq_len: ${nothing} refers to no key. Known"),
    ("validate demo --import nosuchmodule", "--import nosuchmodule: there is no module nosuchmodule on"),
    ("validate demo --import ./x.py", "--import './x.py': takes the name of a Python module, as"),
    ("validate demo --import builtins", "--import builtins: registers no component. Put"),
    ("validate demo_dpo generation.turns=0", "key generation.turns: must be at least 1, not 0"),
    ("validate demo_aries rounds=-1", "key rounds: must be at least 0, not -1"),
    ("validate quantize seq_len=0", "key seq_len: must be at least 2, not 0"),
    ("validate quantize quantization=int3", "quantization has no option int3. Did you mean int8 or int4?"),
    ("validate quantize checkpoint=nowhere", "There is no nowhere"),
    ("validate quantize sensitivity.budget=lots", "key sensitivity: budget (lots) must be bytes (80M), or a"),
    ("run demo --dry-run optimizer.lr=-1", "key optimizer: lr (-1.0) must be at least 0"),
]

MODELS_AND_DATA = [
    ("data prepare", "Name files, folders or globs to prepare, or --stdlib (and"),
    ("data prepare ''", "plmtune data: the argument after prepare is empty. Give a"),
    ("data prepare nothing.txt", "There is no file nothing.txt"),
    ("data prepare d.txt --stdlib", "Name files, folders or globs to prepare, or --stdlib (and"),
    ("data prepare d.txt --tokenizer nosuch", "nosuch is neither a tokenizer's name nor a file or"),
    ("data prepare d.txt --holdout 2", "holdout (2.0) must be at least 0 and below 1: it is the"),
    ("data prepare d.txt --format xml", "--format: xml is none of auto, text, jsonl, csv, parquet."),
    ("data prepare d.txt --separator ''", "separator is the empty text; leave it out (null) to keep a"),
    ("data prepare d.txt --encoding klingon", "encoding 'klingon' is unknown to Python; utf-8, latin-1"),
    ("data prepare empty.txt --tokenizer byte", "empty.txt is empty"),
    ("data prepare demo.yml --holdout 0.1", "--holdout goes with files; with a config set its key, as"),
    ("data inspect nowhere", "nowhere is no directory of prepared tokens: it has no"),
    ("data inspect m", "m is no directory of prepared tokens: it has no"),
    ("data inspect chats.jsonl --row 99", "--row 99: chats.jsonl has 1 row"),
    ("data inspect chats.jsonl --window 3", "--window goes with a directory of prepared tokens, which"),
    ("data inspect pairs.jsonl --template nosuch", "nosuch is neither a chat template's name nor a file with"),
    ("tokenizer train nothing.txt --out t", "--vocab-size is missing. Usage: plmtune tokenizer train"),
    ("tokenizer train d.txt --vocab-size 3 --out t", "tokenizer train: vocab_size (3) must exceed 256 bytes and 3"),
    ("tokenizer inspect nosuch", "TEXT is missing. Usage: plmtune tokenizer inspect"),
    ("generate nowhere --prompt x", "There is no nowhere"),
    ("generate plm_20m --prompt x", "plm_20m is a preset of the group model: plmtune run pretrain model=plm_20m"),
    ("generate m", "--prompt is missing. Usage: plmtune generate"),
    ("generate m --prompt x --temperature -1", "--temperature: must be at least 0, not -1.0."),
    ("generate m --prompt x --top-p 2", "--top-p: must be above 0 and at most 1, not 2.0."),
    ("generate m --prompt x --max-new-tokens 0", "--max-new-tokens: must be at least 1, not 0."),
    ("generate m --prompt x --device tpu", "--device tpu: unknown. Known: cpu, cuda, cuda:1, "),
    ("generate m --prompt x --dtype fp8", "there is no option --dtype. Known: --chat, --chat-template, --device, "),
    ("generate d.txt --prompt x", "d.txt is not a directory. Give a checkpoint, a model"),
    ("generate damaged --prompt x", "damaged/model.safetensors is damaged or not a safetensors"),
    ("generate fake.gguf --prompt x", "fake.gguf is a GGUF file. Make a model directory of it"),
    ("chat nowhere", "There is no nowhere"),
    ("chat d.txt", "d.txt is not a directory. Give a checkpoint, a model"),
    ("perplexity nowhere", "There is no nowhere"),
    ("perplexity m --text nothing.txt", "there is no option --text. "),
    ("eval nowhere --tasks gsm8k", "There is no nowhere"),
    ("eval m", "Name what to measure: --tasks gsm8k,arc_easy, or --suite"),
    ("eval m --tasks ''", "Name what to measure: --tasks gsm8k,arc_easy, or --suite"),
    ("compare nothing.json", "There is no result nothing.json (seen from"),
    ("compare d.txt", "d.txt is damaged or no result: it is not valid JSON"),
    ("compare", "There is no folder evaluations/ here. Make results in"),
    ("card nowhere", "There is no nowhere"),
    ("card m nothing.json", "There is no result nothing.json (seen from"),
    ("convert nothing.gguf out", "There is no file nothing.gguf"),
    ("convert d.txt out", "d.txt is not a GGUF file: it does not begin with GGUF"),
    ("convert fake.gguf out", "fake.gguf is of GGUF version 774778414; 2 and 3 can be read"),
    ("export nowhere --to gguf", "There is no nowhere"),
    ("export m", "plmtune export: --to is missing. It is gguf, "),
    ("export m --to onnx", "plmtune export: --to: onnx is none of gguf, "),
    ("export m --to gguf --quant q3", "--quant q3: gguf has no such type. Known: bf16, f16, f32"),
    ("verify nothing.gguf m", "--against is missing. Usage: "),
    ("bench m --context 0", "plmtune bench: there is no option --context. Did you mean --contexts?"),
    ("bench", "There is no finished run under runs/"),
    ("plan nosuch", "There is no config nosuch. Known: aries, demo, demo_aries"),
    ("plan plm_20m --device nosuch", "There is no device nosuch; a file of your own is given as"),
    ("plan plm_20m --device plm_150m", "There is no device plm_150m; a file of your own is given as"),
    ("plan plm_20m --device nothing.yaml", "nothing.yaml: no such file. Write one with plmtune bench"),
    ("plan plm_20m --scheme int3", "plmtune and llama.cpp has no scheme int3. Did you mean int8"),
    ("plan plm_20m --runtime vllm", "There is no runtime vllm. Known: llama.cpp, plmtune"),
    ("plan plm_20m --context lots", "--context: 'lots' must be numbers of tokens with commas"),
    ("plan plm_20m --json x.txt", "x.txt: must be a .json file in a folder that is there"),
    ("plan plm_20m --sweep", "--sweep: no key has several values. Write"),
    ("merge nowhere out", "There is no nowhere"),
    ("merge m out", "m holds no adapters: it is a whole model already"),
]

# Beside each mistake is what is right, in RIGHT.
MORE = [
    ("run demo two.yaml logger=[nosuch]", "logger has no option nosuch. Known: jsonl, several, "),
    ("validate demo data=mix data.sources={a: filez}", "'data.sources={a: filez}'"),
    ("validate demo data=mix 'data.sources={a: filez}'", "data has no component filez. Did you mean files?"),
    ("run demo --dry-run data=files data.paths=nowhere.txt", "There is no file nowhere.txt"),
    ("validate demo optimizer.lr=1e9", "key optimizer: lr (1000000000.0) must be at least 0 and at most 10"),
    ("validate demo optimizer.weight_decay=100", "weight_decay (100.0) must be at least 0 and at most 10"),
    ("validate demo_sft epochs=1e9", "key epochs: must be above 0 and at most 10,000, not 1000000000.0"),
    ("validate demo_dpo loss.beta=1e6", "key loss: beta (1000000.0) must be above 0 and at most 1,000"),
    ("validate demo global_batch_size=1000000000", "must be at least 1 and at most 16,777,216, not 1000000000"),
    ("run -m demo optimizer.lr=-1,1e9", "plmtune: job 0 (optimizer.lr=-1): key optimizer: lr (-1.0) must be at least"),
    ("run -m demo model=plm_tiny,plm_tinny", "model has no option plm_tinny. Did you mean plm_tiny?"),
    ("run -m demo seed=1,x", "key seed: x is not a whole number"),
    ("data prepare bad.jsonl", "bad.jsonl, line 1 is not JSON: "),
    ("data prepare bad.jsonl --out new/folder", "bad.jsonl, line 1"),
    ("validate demo data=files 'data.paths=my (text).txt'", "'data.paths=\"my (text).txt\"'"),
    ("validate demo optimizer.lr=0,001", "several values. As one number: optimizer.lr=0.001."),
    ("validate demo comma.yaml", "comma.yaml, key optimizer.lr: 0,001 is not a number: write 0.001."),
    ("generate m --prompt x --temperature 0,8", "--temperature: 0,8 is not a number: write 0.8."),
    ("generate m --prompt x --temprature 1", "there is no option --temprature. Did you mean --temperature?"),
    ("generate m --prompt x --seed one", "--seed: one is not a whole number."),
    ("generate m more --prompt x", "plmtune generate: too many arguments: more. Usage: plmtune generate"),
    ("generate m --prompt", "--prompt needs a value. Usage: "),
    ("export m --to ggfu", "--to: ggfu is none of gguf, "),
    ("data prepar d.txt", "plmtune data: there is no command prepar. Did you mean prepare?"),
    ("cp plm_20 x.yaml", "There is no config, preset or recipe plm_20. See: plmtune ls. Did you mean "),
    ("resume runs/nope", "runs/nope is not a run directory: it has no config.yaml. There are no runs under runs/."),
    ("validate demo_dpo phases=[]", "demo_dpo has no key phases (it belongs to pretrain, sft)"),
    ("validate lora", "There is no config lora. lora is a component of the group peft: plmtune run sft peft=lora"),
]

RIGHT = [
    "validate demo two.yaml logger=[tensorboard]",
    "validate demo two.yaml logger=[]",
    "validate demo none.yaml",
    "validate demo data=mix 'data.sources={a: stdlib}'",
    "run demo --dry-run data=files data.paths=d.txt",
    "validate demo optimizer.lr=0.001 optimizer.weight_decay=0",
    "validate sft data=docstrings epochs=2",
    "run -m demo optimizer.lr=0.01,0.02 --dry-run",
    "data prepare d.txt --tokenizer byte --out prepared",
    "validate demo data=files 'data.paths=\"my (text).txt\"'",
    "cp plm_20m copied.yaml --overwrite",
    "validate demo eval.tasks=[]",
    "validate demo",
    "validate demo good.yaml optimizer.lr=3e-4",
    "validate demo model=preset.yaml",
    "validate demo model.ffn=swiglu scheduler=wsd",
    "validate demo logger=[jsonl,tensorboard]",
    "validate demo logger=null",
    "validate demo data=files 'data.paths=[\"d.txt\"]' 'data.separator=\"\\\\n\\\\n\"'",
    "validate demo 'phases=[{name: a, tokens: 1M}]'",
    "validate demo guard.patience=1 'run_dir=\"a(b\"'",
    "run demo --dry-run",
    "ls devices",
    "ls model/ffn",
    "plan plm_tiny --device pi5 --context 128",
]

# Names of what is under the command line, which a person has not typed.
FOREIGN = re.compile(
    r"Traceback|omegaconf|full_key|HydraException|\w+Config\b|hydra\.core|\btorch\.|<class|\w+Exception\b", re.I
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small model, a damaged one, and files with and without mistakes."""
    root = tmp_path_factory.mktemp("place")
    for name, content in FILES.items():
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    save_small(root / "m")
    shutil.copytree(root / "m", root / "damaged")
    weights = root / "damaged/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return root


class TestMistakes:
    @pytest.mark.parametrize(
        ("command", "said"), [*COMMANDS, *CONFIGS, *MODELS_AND_DATA, *MORE], ids=lambda value: value[:60]
    )
    def test_ends_with_one_sentence_and_leaves_nothing(
        self, command: str, said: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(place)
        before = sorted(place.rglob("*"))
        code, _, err = run(monkeypatch, capsys, *shlex.split(command))
        assert code == 2, err
        assert said in err
        assert not FOREIGN.search(err), err
        assert err.count("\n") <= 7, err
        assert sorted(place.rglob("*")) == before

    @pytest.mark.parametrize("command", RIGHT)
    def test_the_right_command_beside_it_is_accepted(
        self, command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(place)
        code, _, err = run(monkeypatch, capsys, *shlex.split(command))
        assert code == 0, err

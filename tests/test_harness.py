"""EleutherAI's evaluation harness (lm_eval), which knows nothing of gsa_ext, on a saved converted model, with tasks in local files."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gsa_ext.hf import convert

TASKS = {
    "slots_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
    "slots_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: [" yes", " no", " perhaps, or not"]
doc_to_target: 1
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "slots_generate": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: ""
generation_kwargs: {until: ["\\n\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
TEXTS = ["a short one", "The slots of a head keep what was read and forget it by and by.", "Another text, of another length: 0123456789"]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
@pytest.mark.parametrize("preset, layers", [("t2r", "all"), ("liger", [1])])
def test_lm_eval(preset, layers, tmp_path):
    """Perplexity, choices and generated text, padded in batches, are those of the model."""
    from gsa_ext.cli._t2r_data import byte_tokenizer

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})                 # the harness starts texts with it
    end = tokenizer.eos_token_id
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        max_position_embeddings=512, bos_token_id=end, eos_token_id=end)).eval()
    convert(model, preset, layers, num_slots=12)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
                                               f"test_split: test\n{task}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"),
                   "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_MODULES_CACHE": str(tmp_path / "modules"), "TOKENIZERS_PARALLELISM": "false"}
    run = subprocess.run([sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", *TASKS, "--include_path", str(tmp_path), "--device", "cpu",
                          "--model_args", f"pretrained={tmp_path}/model,trust_remote_code=True,dtype=float32", "--batch_size", "3", "--log_samples",
                          "--output_path", str(tmp_path / "out")], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]
    samples = {name: [json.loads(line) for line in next((tmp_path / "out").rglob(f"samples_{name}*.jsonl")).read_text().splitlines()] for name in TASKS}

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")

    def log_likelihood(before, text):
        ids = torch.tensor([tokenizer(before)["input_ids"] + tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].log_softmax(-1)
        return logits.gather(1, ids[0, 1:, None])[-len(text.encode()):].sum().item()

    bits = -sum(log_likelihood("<end>", text) for text in TEXTS) / sum(len(text) for text in TEXTS) / math.log(2)
    assert results["slots_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    for sample in samples["slots_choice"]:
        want = [log_likelihood(sample["doc"]["text"], choice) for choice in (" yes", " no", " perhaps, or not")]
        assert [float(x[0][0] if isinstance(x[0], list) else x[0]) for x in sample["resps"]] == pytest.approx(want, rel=1e-4)
    for sample in samples["slots_generate"]:
        prompt = torch.tensor([tokenizer(sample["doc"]["text"])["input_ids"]])
        want = tokenizer.decode(model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1]:], skip_special_tokens=True)
        assert sample["resps"][0][0] == want

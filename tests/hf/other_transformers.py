"""Run by another interpreter: FOLDER INPUTS OUTPUTS [OTHER …]; the exported model's logits and texts by its
transformers, in a process that has loaded the other folders before."""

import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def outputs(folder, rows, mask):
    """Logits whole, step by step and padded, and generated tokens, in float64."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float64, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    model = model.double().eval().requires_grad_(False)
    cache, steps = None, []
    for at in range(rows.shape[1]):
        out = model(rows[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    found = {"whole": model(rows, attention_mask=mask, use_cache=False).logits, "steps": torch.cat(steps, 1)}
    read = []
    model.model.layers[0].register_forward_hook(lambda _, given, __: read.append(given[0].shape[1]))
    given, embeddings = {"input_ids": rows}, {"inputs_embeds": model.get_input_embeddings()(rows)}
    ways = {
        "greedy": given,
        "beams": {**given, "num_beams": 3},
        "sampled": {**given, "do_sample": True, "top_k": 9},
        "pieces": {**given, "prefill_chunk_size": 17},
        "embeddings": embeddings,
    }
    for name, options in ways.items():
        torch.manual_seed(0)
        read.clear()
        found[name] = model.generate(attention_mask=mask, max_new_tokens=20, eos_token_id=None, **options)
        assert sum(read) == rows.shape[1] + 19, (name, read)
    assert torch.equal(found["pieces"], found["greedy"])
    assert torch.equal(found["embeddings"], found["greedy"][:, rows.shape[1] :])
    bf16 = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    rates = [weight.dtype for name, weight in bf16.named_parameters() if name.endswith("A_log")]
    assert rates and set(rates) == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    found["text"] = tokenizer(["def f(x):", "import os, re, sys"], return_tensors="pt", padding=True)["input_ids"]
    return found


if __name__ == "__main__":
    folder, inputs, target, *others = sys.argv[1:]
    for other in others:
        AutoModelForCausalLM.from_pretrained(other, trust_remote_code=True)
    given = load_file(inputs)
    found = {name: value.contiguous() for name, value in outputs(folder, given["rows"], given["mask"]).items()}
    save_file(found, target, metadata={"transformers": transformers.__version__})

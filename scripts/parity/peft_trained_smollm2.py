#!/usr/bin/env python3
"""A PEFT training run on SmolLM2-135M-Instruct, its adapter as published, and what it answers.

    python peft_trained_smollm2.py HF_FOLDER [tests/fixtures/peft_trained]

HF_FOLDER is what `scripts/fixtures/smollm2_to_hf.py` makes of the GGUF file. 40 steps on `examples/data/demo_train.jsonl` (r 2 on q
and v, rsLoRA, f32, CPU), then:

* `adapter_config.json`, `adapter_model.safetensors`: as PeftModel.save_pretrained writes them; bf16 tensors, as TRL keeps them;
* `greedy.json`: for 10 held-out orders `input_ids`, the `new_ids` of the reloaded adapter (f32, greedy, at most 48; the end token
  is the last), their text, the text of the base model, and `margin`, the smallest distance between the two largest logits on
  the way. Orders whose margin is near f32 rounding are left out: equal tokens are then a fair demand.

Made with Python 3.11.7, torch 2.15.0, transformers 5.23.0, peft 0.21.2.
"""

import json
import pathlib
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS, BATCH, LR, NEW, PROMPTS, MARGIN = 40, 4, 3e-3, 48, 10, 5e-3
DATA = pathlib.Path("examples/data")


def rows(name):
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(4)
    source = sys.argv[1]
    out = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else "tests/fixtures/peft_trained")
    tokenizer = AutoTokenizer.from_pretrained(source)

    def base():
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")

    def encode(messages, prompt):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]

    config = LoraConfig(
        r=2, lora_alpha=16, use_rslora=True, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base(), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    data = rows("demo_train.jsonl")
    for step in range(STEPS):
        total, count = 0.0, 0
        for row in data[step * BATCH : (step + 1) * BATCH]:
            ids, prompt = encode(row["messages"], False), len(encode(row["messages"][:-1], True))
            ids = torch.tensor([ids])
            labels = ids.clone()
            labels[:, :prompt] = -100
            trained = int((labels != -100).sum())
            loss = model(input_ids=ids, labels=labels).loss * trained
            loss.backward()
            total, count = total + loss.item(), count + trained
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= count
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 5) * (1 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {total / count:.4f}", flush=True)

    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    model.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink()

    plain = base().eval()
    tuned = PeftModel.from_pretrained(base(), out).eval()

    def answer(of, ids):
        result = of.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        top = torch.cat(result.logits).topk(2).values
        return result.sequences[0, ids.shape[1] :].tolist(), (top[:, 0] - top[:, 1]).min().item()

    cases = []
    for row in rows("demo_heldout.jsonl"):
        ids = torch.tensor([encode(row["messages"][:-1], True)])
        new, margin = answer(tuned, ids)
        text = tokenizer.decode(new)
        print(f"margin {margin:.4f} {text!r}", flush=True)
        if margin < MARGIN:
            continue
        case = {"input_ids": ids[0].tolist(), "new_ids": new, "text": text, "margin": round(margin, 5)}
        case["base_text"] = tokenizer.decode(answer(plain, ids)[0])
        case["expected"] = row["messages"][-1]["content"]
        assert case["base_text"] != text
        cases.append(case)
        if len(cases) == PROMPTS:
            break
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (out / "greedy.json").write_text(f"[\n{lines}\n]\n")
    print("bytes:", sum(path.stat().st_size for path in out.iterdir()))


if __name__ == "__main__":
    main()

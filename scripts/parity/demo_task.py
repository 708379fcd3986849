#!/usr/bin/env python3
"""The demo task by transformers + PEFT + bitsandbytes: how well can it be learned, and with which settings?

    python demo_task.py HF_FOLDER [--steps 60 --batch 8 --lr 1e-3 --r 16 --alpha 32 --base nf4|f32 --eval 100]

Trains on examples/data/demo_train.jsonl in the file's order (loss on the answer alone, normalized by its tokens;
AdamW without weight decay, linear warmup over the first 5 % of the steps, then cosine to 0, gradients clipped to norm
1) and prints the held-out exact match of greedy generation before and after.
"""

import argparse
import json
import math
import pathlib
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

DATA = pathlib.Path(__file__).resolve().parents[2] / "examples" / "data"


def rows(name: str) -> list:
    return [json.loads(line)["messages"] for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def example(tokenizer, messages) -> tuple[list[int], int]:
    """Token ids of the whole chat and the length of the part that is not trained."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert whole[: len(prompt)] == prompt
    # The newline after <|im_end|> is the template's, not the model's to write.
    end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
    return whole[:end], len(prompt)


def pad(sequences: list[list[int]], value: int, left: bool = False) -> torch.Tensor:
    width = max(map(len, sequences))
    fill = [[value] * (width - len(s)) for s in sequences]
    return torch.tensor([f + s if left else s + f for s, f in zip(sequences, fill, strict=True)])


@torch.no_grad()
def exact_match(model, tokenizer, held_out, batch: int = 50) -> tuple[float, list]:
    right, wrong = 0, []
    prompts = [
        tokenizer.apply_chat_template(m[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        for m in held_out
    ]
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        ids, mask = pad(part, tokenizer.pad_token_id, left=True), pad([[1] * len(p) for p in part], 0, left=True)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=48, do_sample=False)
        for messages, row in zip(held_out[start : start + batch], out[:, ids.shape[1] :], strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True).strip()
            if text == messages[-1]["content"]:
                right += 1
            else:
                wrong.append((messages[-2]["content"], messages[-1]["content"], text))
    return right / len(held_out), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--base", choices=["nf4", "f32"], default="nf4")
    parser.add_argument("--eval", type=int, default=100, help="held-out rows")
    parser.add_argument("--skip-before", action="store_true")
    parser.add_argument("--save", help="folder for the adapter")
    args = parser.parse_args()
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    kwargs = {"quantization_config": quantization} if args.base == "nf4" else {}
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **kwargs)
    model = get_peft_model(
        base, LoraConfig(r=args.r, lora_alpha=args.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.train()  # also for generation: there is no dropout, and in eval mode bitsandbytes may compute in bf16
    held_out = rows("demo_heldout.jsonl")[: args.eval]
    if not args.skip_before:
        start = time.time()
        with model.disable_adapter():
            score, wrong = exact_match(model, tokenizer, held_out)
        print(f"exact match before: {score:.1%} ({time.time() - start:.0f} s), for example {wrong[0][2]!r}", flush=True)

    examples = [example(tokenizer, messages) for messages in rows("demo_train.jsonl")]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    warmup = max(1, args.steps // 20)

    def schedule(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    start, tokens = time.time(), 0
    for step in range(args.steps):
        part = [examples[(step * args.batch + i) % len(examples)] for i in range(args.batch)]
        ids = pad([e[0] for e in part], tokenizer.pad_token_id)
        mask = pad([[1] * len(e[0]) for e in part], 0)
        labels = pad([[-100] * e[1] + e[0][e[1] :] for e in part], -100)
        hidden = model.base_model.model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        trained = labels[:, 1:] != -100
        logits = model.base_model.model.lm_head(hidden[:, :-1][trained])
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][trained])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        tokens += sum(len(e[0]) for e in part)
        if step % 5 == 4 or step == 0:
            print(f"step {step + 1:4}  loss {loss.item():.4f}  {tokens / (time.time() - start):.0f} tok/s", flush=True)
    print(f"trained on {tokens} tokens in {time.time() - start:.0f} s", flush=True)
    if args.save:
        model.save_pretrained(args.save, save_embedding_layers=False)
    start = time.time()
    score, wrong = exact_match(model, tokenizer, held_out)
    print(f"exact match after: {score:.1%} ({time.time() - start:.0f} s)")
    for sentence, expected, text in wrong[:8]:
        print(f"  {sentence}\n    expected {expected}\n    got      {text}")


if __name__ == "__main__":
    main()

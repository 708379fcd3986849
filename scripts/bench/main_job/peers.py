#!/usr/bin/env python3
"""The main job by the peers: TRL's SFTTrainer (transformers + PEFT + bitsandbytes), and Unsloth's, on the same rows.

    python3 peers.py --model MODEL [--out benches/results/main_job.csv] [--systems unsloth,trl]
        [--cases packed4x2048,docs8] [--top 3] [--steps 11:40] [--limit 150] [--seconds 1200]

MODEL is a folder made by model.py. The same job as ours: prompt/completion rows with the loss on completions only, LoRA of
rank 16 on all linear layers (alpha 32, no dropout), bf16, fused AdamW, no accumulation, and the same real tokens a step:

  case          packing           padding-free, padded by length
  packed4x2048  4 bins of 2,048   16 documents (as many as 4 bins hold)
  docs8         2 bins of 2,048   8 documents

Each variant of VARIANTS runs in a process of its own, the most promising first; --top ends after so many that
work. tok_s counts
real tokens (no padding) over the seconds from the end of step 10 to the end of step 40. A variant that is 15% behind the
best of its system halfway stops there. A system's row in the CSV file is its best variant; every variant, also one that
fails and why, is a line of WORK/peers.jsonl, its output in WORK/logs.

Attention: `varlen` is varlen.py beside this (PyTorch's flash attention; TRL), `xformers` needs that package (Unsloth).
Unsloth's own data preparation may not keep the loss to completions: the labels of the first batch are looked at, and if
need be the rows go in as tokens with labels; "all tokens" in the settings says where not even that worked.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import results
import rows

HERE = pathlib.Path(__file__).resolve().parent
NAMES = {"trl": "TRL", "unsloth": "Unsloth"}
DOCUMENTS = {"packed4x2048": 16, "docs8": 8}
BINS = {"packed4x2048": 4, "docs8": 2}
LENGTH = 2048

# batching, attention, checkpointing, more. The first ones are expected to be the fastest.
TRL = [
    ("packing", "varlen", "off", "liger"),
    ("padding-free", "varlen", "off", "liger"),
    ("packing", "varlen", "off", ""),
    ("padded", "sdpa", "off", "liger"),
    ("packing", "sdpa", "off", "liger"),
    ("packing", "flex_attention", "off", "liger"),
    ("packing", "varlen", "on", "liger"),
]
UNSLOTH = [
    ("packing", "xformers", "off", ""),
    ("padding-free", "xformers", "off", ""),
    ("padded", "xformers", "off", ""),
    ("packing", "sdpa", "off", ""),
    ("padded", "sdpa", "off", ""),
    ("packing", "xformers", "unsloth", ""),
]
VARIANTS = {"trl": TRL, "unsloth": UNSLOTH}


def words(variant: tuple) -> str:
    batching, attention, checkpointing, more = variant
    return " ".join([batching, attention, f"checkpointing={checkpointing}", more]).strip()


def labelled_rows(path: pathlib.Path, tokenizer, everything: bool) -> list[dict]:
    """The rows as tokens with labels, as our trainer and TRL make them."""
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"], add_special_tokens=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
        masked = 0 if everything else len(prompt)
        found.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return found


def load_model(job: dict):
    """Model (of TRL without adapter), tokenizer, adapter configuration (of TRL)."""
    import torch

    _, attention, checkpointing, _ = job["variant"]
    if job["system"] == "unsloth":
        from unsloth import FastLanguageModel

        recompute = {"off": False, "on": True}.get(checkpointing, checkpointing)
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=job["model"],
            max_seq_length=LENGTH,
            dtype=torch.bfloat16,
            load_in_4bit=True,
            use_gradient_checkpointing=recompute,
        )
        modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = FastLanguageModel.get_peft_model(
            model,
            r=16,
            lora_alpha=32,
            lora_dropout=0,
            bias="none",
            target_modules=modules,
            use_gradient_checkpointing=recompute,
            random_state=42,
        )
        return model, tokenizer, None
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if attention == "varlen":
        import varlen

        attention = varlen.register()
    model = AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=torch.bfloat16,
        device_map={"": "cpu" if job["cpu"] else 0},
        attn_implementation=attention,
    )
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return model, AutoTokenizer.from_pretrained(job["model"]), lora


def make_trainer(job: dict, model, tokenizer, lora, data: str, callback):
    import datasets
    from trl import SFTConfig, SFTTrainer

    batching, _, checkpointing, more = job["variant"]
    path = pathlib.Path(job["rows"])
    if data == "rows":
        dataset = datasets.Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()])
    else:
        dataset = datasets.Dataset.from_list(labelled_rows(path, tokenizer, data == "all tokens"))
    options = {
        "output_dir": job["folder"],
        "per_device_train_batch_size": (BINS if batching == "packing" else DOCUMENTS)[job["case"]],
        "gradient_accumulation_steps": 1,
        "max_steps": job["last"],
        "learning_rate": 2e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.03,
        "optim": "adamw_torch" if job["cpu"] else "adamw_torch_fused",
        "weight_decay": 0.0,
        "bf16": True,
        "use_cpu": job["cpu"],
        "gradient_checkpointing": checkpointing != "off",
        "packing": batching == "packing",
        "padding_free": batching == "padding-free",
        # Without packing TRL enforces no length there; no row is longer.
        "max_length": None if batching == "padding-free" else LENGTH,
        "completion_only_loss": True if data == "rows" else None,
        "train_sampling_strategy": "group_by_length" if batching == "padded" else "random",
        "logging_steps": 1000,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 42,
    }
    if checkpointing == "on":
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if "liger" in more and not job["cpu"]:
        options["use_liger_kernel"] = True
    more = {"peft_config": lora} if lora else {}
    return SFTTrainer(
        model=model,
        args=SFTConfig(**options),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[callback],
        **more,
    )


def child(job: dict) -> dict:
    """One variant: what it did, as a row."""
    start = time.perf_counter()
    if job["system"] == "unsloth":
        # It patches transformers and wants to be imported before it.
        import unsloth  # noqa: F401
    import torch
    from transformers import TrainerCallback

    def synchronize() -> float:
        if not job["cpu"]:
            torch.cuda.synchronize()
        return time.perf_counter()

    first, last = job["first"], job["last"]
    middle = (first + last) // 2
    batches: list[tuple] = []
    seen: dict = {}

    def speed(after: int, until: int, seconds: float) -> tuple[float, int]:
        # Training may collate ahead, so only the batches of these steps count.
        counted = [(int(real), int(trained)) for real, trained in batches[after:until]]
        return sum(real for real, _ in counted) / seconds, sum(trained for _, trained in counted)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (first - 1, middle, last):
                seen[state.global_step] = synchronize()
            if state.global_step == middle and job["best"]:
                halfway, _ = speed(first - 1, middle, seen[middle] - seen[first - 1])
                if halfway < 0.85 * job["best"]:
                    control.should_training_stop = True
            return control

    model, tokenizer, lora = load_model(job)
    print(f"loaded after {time.perf_counter() - start:.1f} s", flush=True)
    pad = tokenizer.pad_token_id

    def count(inputs: dict) -> tuple:
        real = (inputs["input_ids"] != pad).sum()
        labels = inputs.get("labels")
        # The first token of a row has no loss whatever its label is; a few tokens of thousands.
        return real, (labels != -100).sum() if labels is not None else real

    # Rows as they are; where the loss does not come out on completions, the same rows with labels made here.
    reasons = []
    for data in ("rows", "labels", "all tokens"):
        try:
            trainer = make_trainer(job, model, tokenizer, lora, data, Watch())
            real, trained = (int(number) for number in count(next(iter(trainer.get_train_dataloader()))))
            print(f"first batch from {data}: {real} tokens, {trained} with a loss", flush=True)
            if data == "all tokens" or 0 < trained < 0.6 * real:
                break
            reasons.append(f"from {data}: {trained} of {real} tokens have a loss")
        except Exception as error:
            if data == "all tokens":
                raise
            reasons.append(f"from {data}: {type(error).__name__}: {error}")
        print(reasons[-1], flush=True)
        # The model has its adapter now.
        lora = None if hasattr(model, "peft_config") else lora

    original = trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        batches.append(count(inputs))
        return original(model, inputs, *args, **kwargs)

    trainer.training_step = training_step
    if not job["cpu"]:
        torch.cuda.reset_peak_memory_stats()
    result = trainer.train()
    until = last if last in seen else middle
    seconds = seen[until] - seen[first - 1]
    tok_s, trained = speed(first - 1, until, seconds)
    row = {"tok_s": round(tok_s, 1), "trained_tokens": trained, "loss": result.training_loss, "data": data}
    row["tokens"] = int(sum(real for real, _ in batches[first - 1 : until]))
    row["steps"] = until - first + 1
    row["all_seconds"] = round(time.perf_counter() - start, 1)
    if reasons:
        row["remarks"] = [reason[:300] for reason in reasons]
    if not job["cpu"]:
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return row


def versions(system: str) -> str:
    import importlib.metadata as metadata

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "?"

    if system == "unsloth":
        return f"Unsloth {version('unsloth')} + TRL {version('trl')}"
    parts = {"trl": "TRL", "transformers": "transformers", "peft": "PEFT", "bitsandbytes": "bitsandbytes"}
    return " + ".join(f"{name} {version(package)}" for package, name in parts.items())


def environment(job: dict) -> dict:
    """Of the child: no network, and xformers only where it is wanted."""
    variables = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_CACHE": job["folder"] + "/datasets",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
    }
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    if job["variant"][1] == "xformers":
        more = [f"{path}/with_xformers" for path in paths if pathlib.Path(path, "with_xformers").is_dir()]
        paths += more
        libraries = [f"{path}/lib" for path in more] + libraries
    paths, libraries = (os.pathsep.join(filter(None, names)) for names in (paths, libraries))
    return variables | {"PYTHONPATH": paths, "LD_LIBRARY_PATH": libraries}


def measure(job: dict, log: pathlib.Path, limit: float) -> dict:
    """Runs a child, and returns its row or {"error": why}."""
    answer = pathlib.Path(job["folder"]) / "row.json"
    answer.parent.mkdir(parents=True, exist_ok=True)
    answer.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "peers.py"), "--child", json.dumps(job | {"answer": str(answer)})]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=job["folder"],
            env=environment(job),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {limit:.0f} s"}
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    if answer.exists():
        return json.loads(answer.read_text())
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return {"error": f"exit status {process.returncode}: {said[-1][:300] if said else 'it said nothing'}"}


class Peers:
    def __init__(self, args):
        self.args = args
        self.work = args.work.resolve()
        (self.work / "logs").mkdir(parents=True, exist_ok=True)
        rows.write_rows(self.work)
        self.end = time.monotonic() + args.seconds
        self.place = results.place()
        self.rows: list[dict] = []

    def variant(self, system: str, case: str, variant: tuple, best: float) -> dict:
        left = self.end - time.monotonic()
        row = {"system": versions(system), "case": case, "settings": words(variant)}
        if left < self.args.least:
            row["error"] = "no time left"
        else:
            name = re.sub(r"[^\w.]+", "_", f"{system}-{case}-{row['settings']}")
            job = {
                "system": system,
                "case": case,
                "variant": variant,
                "model": str(self.args.model.resolve()),
                "rows": str(self.work / "rows.jsonl"),
                "folder": str(self.work / "run" / name),
                "first": self.args.steps[0],
                "last": self.args.steps[1],
                "best": best,
                "cpu": self.args.cpu,
            }
            row |= measure(job, self.work / "logs" / f"{name}.txt", min(self.args.limit, left))
        if row.get("data") == "all tokens":
            row["settings"] += " all tokens"
        row |= self.place
        self.rows.append(row)
        with (self.work / "peers.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        outcome = row.get("error", "")[:160] or f"{row['tok_s']:,.0f} tok/s, {row.get('peak_gb', '?')} GB, {row['steps']} steps"
        print(f"{row['system']}, {case}, {row['settings']}: {outcome}", flush=True)
        return row

    def run(self) -> None:
        for case in self.args.cases:
            for system in self.args.systems:
                best, measured = None, 0
                for variant in VARIANTS[system]:
                    only = self.args.only
                    if measured == self.args.top or only and not any(text in words(variant) for text in only):
                        continue
                    row = self.variant(system, case, variant, best["tok_s"] if best else 0.0)
                    if "error" in row:
                        continue
                    measured += 1
                    if best is None or row["tok_s"] > best["tok_s"]:
                        best = row
                if best and self.args.out:
                    results.append(self.args.out, best)

    def table(self) -> str:
        lines = []
        for row in self.rows:
            figures = ["", "", "", "", row["error"][:70]] if "error" in row else None
            figures = figures or [
                f"{row['tok_s']:,.0f}",
                str(row.get("peak_gb", "")),
                str(row["trained_tokens"]),
                str(row["steps"]),
                f"{row['data']}, {row['all_seconds']:.0f} s in all",
            ]
            lines.append([row["system"].split(" + ")[0], row["case"], row["settings"], *figures])
        return results.table(["system", "case", "settings", "tok/s", "GB", "trained", "steps", "remarks"], lines)


def arguments():
    def span(text: str) -> tuple[int, int]:
        first, last = (int(number) for number in text.split(":"))
        return first, last

    def names(known):
        def split(text: str) -> list[str]:
            if unknown := set(text.split(",")) - set(known):
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(known)}")
            return text.split(",")

        return split

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/main_job_peers"))
    parser.add_argument("--out", type=pathlib.Path, help="CSV file to append to")
    parser.add_argument("--systems", type=names(VARIANTS), default=["unsloth", "trl"])
    parser.add_argument("--cases", type=names(DOCUMENTS), default=list(DOCUMENTS))
    parser.add_argument("--top", type=int, default=100, help="so many variants of each system and case")
    parser.add_argument("--only", action="append", help="variants whose settings contain this text")
    parser.add_argument("--steps", type=span, default=(11, 40), help="steps that count")
    parser.add_argument("--limit", type=float, default=150, help="seconds of one variant")
    parser.add_argument("--seconds", type=float, default=3600, help="seconds of everything")
    parser.add_argument("--least", type=float, default=30, help="no variant begins with fewer seconds left")
    parser.add_argument("--cpu", action="store_true", help="to try this script with a tiny model; TRL only")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        job = json.loads(sys.argv[2])
        try:
            row = child(job)
        except Exception as error:  # noqa: BLE001: whatever it is, it is the reason
            import traceback

            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"}
        pathlib.Path(job["answer"]).write_text(json.dumps(row))
        # Compiler workers and the like need not be waited for.
        sys.stdout.flush()
        os._exit(0)
    peers = Peers(arguments())
    try:
        peers.run()
    finally:
        print("\n" + peers.table())


if __name__ == "__main__":
    main()

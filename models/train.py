"""Trains the embedded model: a small Llama that talks like an airline's desk.

    python models/train.py --out models/airline-tiny --minutes 30

Builds the tokenizer from the corpus, trains on the conversations as the chat template renders them, writes a directory
that `transformers` loads. It needs torch, transformers and tokenizers, one CPU core and about 2 GB of memory.
The seed is fixed, but the schedule follows the clock, so another machine gives other (similar) weights.
"""

import argparse
import gzip
import json
import math
import os
import random
import re
import string
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus" / "airline_dialogues.jsonl.gz"
TEMPLATE = HERE / "airline-tiny" / "chat_template.jinja"

SEED = 1234
CONTEXT = 8192
VOCAB = 2560
PAD, END = "<|pad|>", "<|end|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
LOSS_WEIGHT = [0.05, 0.3, 1.0, 0.1]  # by role: what the assistant says matters most, the one system prompt hardly
HELD_OUT_TASKS = ["4", "14", "23", "33", "45"]  # both trials of a task, so that its text was never seen

# --- the corpus -----------------------------------------------------------------------------------------------------


def read_sessions(path=CORPUS):
    """-> (training sessions, held-out sessions), each a dict with "session" and "messages"."""
    with gzip.open(path, "rt", encoding="utf-8") as f:
        sessions = [json.loads(line) for line in f]
    for s in sessions:
        for m in s["messages"]:  # the user simulator's end mark is not speech
            m["content"] = (m["content"] or "").replace("###STOP###", "")
    held = [s for s in sessions if s["session"].split("-")[1] in HELD_OUT_TASKS]
    return [s for s in sessions if s not in held], held


def tools_of(sessions):
    """The corpus has no tool schemas: names and parameters as the calls show them."""
    tools = {}
    for s in sessions:
        for m in s["messages"]:
            for call in m.get("tool_calls", []):
                tools.setdefault(call["name"], {}).update(dict.fromkeys(json.loads(call["arguments"])))
    functions = [{"name": n, "parameters": {"properties": {k: {} for k in p}}} for n, p in sorted(tools.items())]
    return [{"type": "function", "function": f} for f in functions]


USER_ID = re.compile(r"\b([a-z]+)_([a-z]+)_(\d{4})\b")


def disguise(text, names, rng):
    """Other names, ids and flight numbers throughout one session: they must be copied, not learned by heart."""
    new = {}

    def draw(match):
        old = match.group()
        if old not in new:
            digits = "".join(rng.choice(string.digits) for _ in old)
            if old.isdigit() or old[0] == "_":
                new[old] = ("_" if old[0] == "_" else "") + digits[: len(old) - (old[0] == "_")]
            elif old.startswith("HAT"):
                new[old] = "HAT" + digits[:3]
            else:
                new[old] = "".join(rng.choice(string.ascii_uppercase + string.digits) for _ in old)
        return new[old]

    for first, last in {m[:2] for m in USER_ID.findall(text)}:
        if len(first) > 2 and len(last) > 2 and last not in ("card", "details"):
            for old, other in ((first, rng.choice(names[0])), (last, rng.choice(names[1]))):
                text = re.sub(rf"(?<![a-z]){old}(?![a-z])", other, text)
                text = re.sub(rf"\b{old.title()}\b", other.title(), text)
    return re.sub(r"\bHAT\d{3}\b|\b(?=[A-Z]*\d|[A-Z]{6})[A-Z0-9]{6}\b|_\d{4,7}\b", draw, text)


# --- the tokenizer --------------------------------------------------------------------------------------------------


def build_tokenizer(sessions):
    """Byte-level BPE; digits stand alone, so numbers and ids are copied digit by digit."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 2,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(corpus_text(sessions), trainer)
    # marks that the reader of an answer wants to see, so not "special"
    tok.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    out = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=ROLES,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    out.chat_template = TEMPLATE.read_text(encoding="utf-8")
    assert len(out) == VOCAB, len(out)
    return out


def corpus_text(sessions):
    yield sessions[0]["messages"][0]["content"]
    for s in sessions:
        for m in s["messages"][1:]:
            yield m["content"]
            for call in m.get("tool_calls", []):
                yield json.dumps({"name": call["name"]}) + call["arguments"]


# --- the data -------------------------------------------------------------------------------------------------------


class Data:
    def __init__(self, tok, sessions):
        self.tok, self.sessions, self.tools = tok, sessions, tools_of(sessions)
        ids = sorted({m[:2] for s in sessions for m in USER_ID.findall(json.dumps(s["messages"]))})
        self.names = [i[0] for i in ids if len(i[0]) > 2], [i[1] for i in ids if len(i[1]) > 2]
        self.role_ids = np.array(tok.convert_tokens_to_ids(ROLES))

    def encode(self, messages, tools=None):
        return self.tok.apply_chat_template(messages, tools=tools, tokenize=False)

    def ids(self, text):
        return np.array(self.tok(text, add_special_tokens=False)["input_ids"])

    def weights(self, ids):
        """A token's loss weight is that of the message it is in. The marks that open a message count little."""
        which = (ids[:, None] == self.role_ids).argmax(1)
        opens = np.isin(ids, self.role_ids)
        last = np.maximum.accumulate(np.where(opens, np.arange(len(ids)), 0))
        w = np.array(LOSS_WEIGHT)[which[last]]
        w[opens] = 0.1
        return w

    def window(self, length, with_system, rng):
        """-> (ids, weights, positions) of `length` + 1 tokens that begin where a message begins."""
        messages = rng.choice(self.sessions)["messages"]
        if not with_system:
            messages = messages[1:]
        tools = self.tools if rng.random() < 0.15 else None
        ids = self.ids(disguise(self.encode(messages, tools), self.names, rng))
        starts = np.flatnonzero(np.isin(ids, self.role_ids))
        start = 0
        if not with_system and rng.random() < 0.7:
            start = rng.choice(starts[starts <= max(0, len(ids) - length // 2)])
        ids = ids[start : start + length + 1]
        pos = np.arange(len(ids))
        if rng.random() < 0.4:  # leave out positions somewhere: a long conversation's distances at a short one's cost
            room = min(CONTEXT - len(ids), rng.choice([256, 2048, CONTEXT]))
            pos[rng.randrange(1, len(ids)) :] += rng.randrange(room)
        weights = self.weights(ids)
        short = length + 1 - len(ids)
        ids = np.pad(ids, (0, short), constant_values=self.tok.pad_token_id)
        pos = np.pad(pos, (0, short), constant_values=CONTEXT - 1)
        return ids, np.pad(weights, (0, short)), pos

    def batch(self, rows, length, with_system, rng):
        rows = [self.window(length, with_system, rng) for _ in range(rows)]
        ids, weights, pos = (torch.from_numpy(np.stack(x)) for x in zip(*rows, strict=True))
        return ids, weights.float(), pos


# --- the model ------------------------------------------------------------------------------------------------------


def build_model(tok):
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,  # few layers: what a decode step costs on a CPU is mostly calls, not arithmetic
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=None, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id
    )
    return model


def loss_of(model, ids, weights, pos):
    # The mask of ones matters: without it transformers takes a jump in the positions for the start of another sequence.
    x, y = ids[:, :-1], ids[:, 1:]
    logits = model(input_ids=x, position_ids=pos[:, :-1], attention_mask=torch.ones_like(x), use_cache=False).logits
    nll = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none")
    w = weights[:, 1:].flatten()
    return (nll * w).sum() / w.sum()


@torch.no_grad()
def evaluate(model, data, sessions):
    """-> mean loss of (the assistants' tokens, all tokens after the system prompt), whole sessions, true positions."""
    sums = np.zeros((2, 2))
    for s in sessions:
        ids = data.ids(data.encode(s["messages"]))[:CONTEXT]
        x = torch.from_numpy(ids)[None]
        nll = F.cross_entropy(model(input_ids=x).logits[0, :-1].float(), x[0, 1:], reduction="none").numpy()
        w = data.weights(ids)[1:]
        for i, pick in enumerate((w == LOSS_WEIGHT[2], w != LOSS_WEIGHT[0])):
            sums[i] += nll[pick].sum(), pick.sum()
    return sums[:, 0] / sums[:, 1]


def train(model, data, held, minutes, lr=3e-3):
    """First short windows of the talk alone, then whole sessions, system prompt and all, as they are served."""
    rng = random.Random(SEED)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    start, step, seen, mean = time.time(), 0, 0, None
    while (done := (time.time() - start) / (60 * minutes)) < 1:
        rows, length, with_system = (8, 256, 0) if done < 0.35 else (4, 512, 0) if done < 0.65 else (1, 3072, 0.85)
        ids, weights, pos = data.batch(rows, length, rng.random() < with_system, rng)
        for g in opt.param_groups:
            g["lr"] = lr * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        with torch.autocast("cpu", torch.bfloat16):  # 1.6 times as fast as fp32 on a CPU with avx512_bf16
            loss = loss_of(model, ids, weights, pos)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        seen += ids.numel()
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if step % 50 == 0:
            rate = seen / (time.time() - start)
            print(f"step {step} {done:.0%} loss {mean:.3f} {rate:.0f} tokens/s", flush=True)
        if step % 400 == 0:
            print("  held out: assistant {:.3f}, talk {:.3f}".format(*evaluate(model, data, held[:3])), flush=True)
        step += 1
    print(f"{step} steps, {seen} tokens")


# --- the directory --------------------------------------------------------------------------------------------------


def save(model, tok, out):
    """Weights in bf16. Each file is replaced in one go, so a reader sees the old or the new one."""
    out.mkdir(parents=True, exist_ok=True)
    tmp = out / ".tmp"
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.save_pretrained(tmp)
    tok.save_pretrained(tmp)
    config = json.loads((tmp / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # where older readers look for it
    (tmp / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for f in sorted(tmp.iterdir()):
        f.chmod(0o644)
        os.replace(f, out / f.name)
    tmp.rmdir()


@torch.no_grad()
def answers(model, data, sessions, limit=160):
    """Greedy answers wherever the assistant speaks in the sessions: yields (session, turn, text, tokens, ended)."""
    for s in sessions:
        for i, m in enumerate(s["messages"]):
            if m["role"] == "assistant":
                prompt = data.encode(s["messages"][:i]) + "<|assistant|>"
                x = torch.from_numpy(data.ids(prompt))[None]
                y = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=limit)[0, x.shape[1] :]
                ended = y[-1].item() == data.tok.eos_token_id
                yield s["session"], i, data.tok.decode(y, skip_special_tokens=True), len(y), ended


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, default=HERE / "airline-tiny")
    ap.add_argument("--minutes", type=float, default=30)
    args = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)

    sessions, held = read_sessions()
    tok = build_tokenizer(sessions)
    data = Data(tok, sessions)
    model = build_model(tok)
    n = sum(p.numel() for p in model.parameters())
    tokens = sum(len(data.ids(data.encode(s["messages"]))) for s in sessions)
    print(f"{n / 1e6:.2f} M parameters, {len(sessions)} sessions of {tokens} tokens")
    print("held out:", *(s["session"] for s in held))

    train(model, data, held, args.minutes)
    model.eval()
    save(model, tok, args.out)
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)  # what users get
    print("held-out loss: assistant {:.3f}, talk {:.3f}".format(*evaluate(model, data, held)))
    print("training loss: assistant {:.3f}, talk {:.3f}".format(*evaluate(model, data, sessions[:10])))
    for _, turn, text, count, ended in answers(model, data, held[:1]):
        print(f"--- {held[0]['session']} message {turn}: {count} tokens, {'ended' if ended else 'cut'}\n{text}")
    size = (args.out / "model.safetensors").stat().st_size
    print(f"{args.out}: model.safetensors {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

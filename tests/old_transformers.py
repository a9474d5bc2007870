"""What an earlier transformers makes of a folder: run by it, with nothing of ours."""

import json
import sys


def main(folder: str, ids: list[int], text: str) -> dict[str, object]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits.float()
    told: dict[str, object] = {
        "version": transformers.__version__,
        "dtype": str(model.dtype),
        "logits": logits.tolist(),
    }
    if text:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        chat = [{"role": "user", "content": text}]
        told["ids"] = tokenizer(text).input_ids
        told["chat"] = tokenizer.apply_chat_template(chat, tokenize=False)
    return told


if __name__ == "__main__":
    folder, ids, text = sys.argv[1:]
    print(json.dumps(main(folder, json.loads(ids), text)))

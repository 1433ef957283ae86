"""Run in a process of its own by `use.export` and `use.parity`: what an exported folder computes, with transformers
alone.

``python fresh_check.py JOB``: reads JOB/job.json and the pictures beside it, writes JOB/answers.json and
JOB/logits.safetensors.
"""

import json
import sys
from pathlib import Path
from typing import Any


class _NotHere:
    """An exported folder must not need the package that it came from."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == "beholder":
            raise ImportError(f"an exported folder imports {name}")


def main(job: Path) -> None:
    sys.meta_path.insert(0, _NotHere())  # pyright: ignore[reportArgumentType]
    import torch
    import transformers
    from safetensors.torch import save_file

    asked = json.loads((job / "job.json").read_text())
    torch.set_num_threads(asked["threads"])
    folder = asked["folder"]
    processor: Any = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=asked["processor_code"])
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=asked["model_code"], dtype=torch.float32, use_safetensors=True
    ).eval()
    if type(model).__name__ != asked["class"]:
        raise SystemExit(f"loaded as {type(model).__name__}, expected {asked['class']}")
    if asked["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, f"{folder}/{asked['adapter']}").eval()
    for parameter in model.parameters():  # as memory is aligned there; files do not align it
        parameter.data = parameter.data.clone()
    answers: list[list[int]] = []
    logits: dict[str, torch.Tensor] = {}
    for k, sample in enumerate(asked["samples"]):
        text = processor.apply_chat_template(sample["messages"], add_generation_prompt=True, tokenize=False)
        own = {} if asked["processor_code"] else {"add_special_tokens": sample["special"]}
        images: list[Any] = [(job / name).read_bytes() for name in sample["images"]]
        if not asked["processor_code"]:  # a class of transformers' own, which takes open pictures
            import io

            from PIL import Image

            images = [Image.open(io.BytesIO(image)) for image in images]
        inputs = processor(text=[text], images=images or None, return_tensors="pt", **own)
        with torch.inference_mode():
            if asked["logits"]:
                logits[f"logits.{k}"] = model(**inputs).logits[0].float().contiguous()
            out = model.generate(**inputs, do_sample=False, max_new_tokens=asked["max_new_tokens"])
        logits[f"ids.{k}"] = inputs["input_ids"][0].clone()
        answers.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    save_file(logits, str(job / "logits.safetensors"))
    told = [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    (job / "answers.json").write_text(json.dumps({"ids": answers, "texts": told}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Chat templates and end tokens on their way: Hugging Face's layout, a checkpoint, a tuned run, and back."""

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="parity needs torch, which the test extra brings for Python 3.11")
transformers = pytest.importorskip("transformers", reason="parity needs transformers, which the test extra brings")

import llama_jax  # noqa: E402
from llama_jax.chat.named import CHATML  # noqa: E402
from llama_jax.checkpoint import Checkpoint, save_checkpoint  # noqa: E402
from llama_jax.convert import ConvertArgs, convert  # noqa: E402
from llama_jax.errors import UserError  # noqa: E402
from llama_jax.tokenizer import Tokenizer  # noqa: E402
from tests.commands import SMALL, SMALL_MODEL  # noqa: E402
from tests.generation.models import build, never_ending  # noqa: E402
from tests.inside import run  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{{ bos_token if m.role == 'user' }}[{{ m.role }}] {{ m.content | trim }} "
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
PROMPTS, NEW = ["The fox", "An owl", "Once upon a time"], 24
ends: list[int] = []
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": " Who? é "}],
    [{"role": "system", "content": "Brief."}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "  c\n"}],
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(small_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in Hugging Face's layout (hf), as others publish it, converted (ours), and back (again)."""
    place = tmp_path_factory.mktemp("chat")
    model = never_ending(small_tokenizer, max_seq_len=128)
    save_checkpoint(place / "plain", model.params, model.args, small_tokenizer)
    convert(ConvertArgs(str(place / "plain"), str(place / "hf"), "huggingface"))
    change(place / "hf" / "tokenizer_config.json", chat_template=TEMPLATE, split_special_tokens=False)
    said = model.generate(PROMPTS, llama_jax.SampleArgs(temperature=0.0, max_new_tokens=NEW))
    ends[:] = [2, said[0].token_ids[5], said[1].token_ids[9]]
    change(place / "hf" / "generation_config.json", eos_token_id=ends)
    convert(ConvertArgs(str(place / "hf"), str(place / "ours")))
    convert(ConvertArgs(str(place / "ours"), str(place / "again"), "huggingface"))
    return place


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def prompt(folder: Path, messages: list[dict[str, str]]) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_prompts_are_transformers_before_and_behind(folders: Path, messages: list[dict[str, str]]) -> None:
    ours = llama_jax.load(str(folders / "ours")).encode_chat(messages)
    assert ours == prompt(folders / "hf", messages) == prompt(folders / "again", messages)
    assert ours.count(1) == sum(message["role"] == "user" for message in messages)


def test_the_checkpoint_keeps_the_template_and_the_end_tokens(folders: Path) -> None:
    kept = folders / "ours" / "model"
    assert (kept / "chat_template.jinja").read_text() == TEMPLATE
    assert json.loads((kept / "generation.json").read_text()) == {"eos_token_id": ends}
    assert (folders / "again" / "chat_template.jinja").read_text() == TEMPLATE
    for name in ("generation_config.json", "config.json"):
        assert json.loads((folders / "again" / name).read_text())["eos_token_id"] == ends
    plain = {path.name for path in (folders / "plain" / "model").iterdir()}
    assert not plain & {"chat_template.jinja", "generation.json"}, (
        "a model without a template has the files that it had"
    )


def test_generation_ends_where_transformers_ends(folders: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders / "hf").eval()
    ours = llama_jax.load(str(folders / "ours"))
    args = llama_jax.SampleArgs(temperature=0.0, max_new_tokens=NEW)
    stopped = 0
    for text in PROMPTS:
        ids = ours.encode(text)
        with torch.no_grad():
            whole = theirs.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0].tolist()
        (made,) = ours.generate_ids([ids], args)
        expected = whole[len(ids) :]
        stopped += made.finish_reason == "stop"
        assert made.token_ids == (expected[:-1] if made.finish_reason == "stop" else expected)
    assert stopped >= 2


def test_the_converter_takes_a_template_by_name(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(ConvertArgs(str(folders / "plain"), str(tmp_path / "chat"), chat_template="chatml"))
    assert (tmp_path / "chat" / "model" / "chat_template.jinja").read_text() == CHATML
    out = capsys.readouterr().out
    assert "a chat template of" in out and "<|im_start|> and <|im_end|> are not" in out
    convert(ConvertArgs(str(folders / "ours"), str(tmp_path / "meta"), "meta"))
    assert "Meta's layout has no place for a chat template" in capsys.readouterr().out
    convert(ConvertArgs(str(tmp_path / "chat"), to="llama2c", dry_run=True))
    assert "llama2.c's file has no place for a chat template" in capsys.readouterr().out


@pytest.mark.slow
def test_a_tuned_model_keeps_the_template_and_the_end_tokens_of_its_base(folders: Path) -> None:
    (folders / "text.txt").write_text("The fox went to the river.\n" * 200)
    argv = ["train.py", "--train.init-from", "ours", "--data.filepath", "text.txt", "--train.save-dir", "tuned"]
    argv += [flag for flag in SMALL if flag not in SMALL_MODEL]
    for steps in ("2", "4"):  # the second goes on with the first's run
        result = run([*argv, "--train.max-steps", steps], folders)
        assert result.returncode == 0, result.stderr
        assert Checkpoint.find(folders / "tuned").chat == Checkpoint.find(folders / "ours").chat
    assert Checkpoint.find(folders / "tuned" / "checkpoints" / "4").chat.end_ids == tuple(ends)


def test_a_damaged_file_is_named(folders: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = build(small_tokenizer)
    save_checkpoint(tmp_path / "model", model.params, model.args, small_tokenizer)
    for content in ("{", '{"eos_token_id": ["a"]}', '{"special_tokens": {"a": 1}}', "[]"):
        (tmp_path / "model" / "model" / "generation.json").write_text(content)
        with pytest.raises(UserError, match=r"generation\.json: expected eos_token_id"):
            Checkpoint.find(tmp_path / "model")

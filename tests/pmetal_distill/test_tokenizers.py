"""Identity of tokenizers: what makes two of them equal, and how their differences are named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers, processors

from pmetal_distill.models import (
    chat_template_fingerprint,
    compare_tokenizers,
    load_model,
    load_tokenizer,
    save_model,
    tokenizer_fingerprint,
)
from tests.tiny import build_tiny_model, save_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A fresh tiny model's folder, to be spoiled."""
    return build_tiny_model(tmp_path / "model", num_layers=2)


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


class TestTokenizers:
    def test_saving_changes_nothing(self, folder: Path, tmp_path: Path) -> None:
        loaded = load_model(folder)
        again = load_model(save_model(loaded, tmp_path / "saved"))
        assert tokenizer_fingerprint(again.tokenizer) == tokenizer_fingerprint(loaded.tokenizer)
        assert chat_template_fingerprint(again.tokenizer) == chat_template_fingerprint(loaded.tokenizer)
        assert compare_tokenizers(again.tokenizer, loaded.tokenizer) == []

    def test_padding_of_the_embedding_plays_no_part(self, tiny_teacher: Path, tmp_path: Path) -> None:
        padded = build_tiny_model(tmp_path / "padded", vocab_size=384, tokenizer_size=320)
        a, b = load_model(tiny_teacher), load_model(padded)
        assert (a.vocab_size, b.vocab_size) == (320, 384)
        assert compare_tokenizers(a.tokenizer, b.tokenizer) == []
        assert tokenizer_fingerprint(a.tokenizer) == tokenizer_fingerprint(b.tokenizer)

    def test_padding_and_truncation_settings_play_no_part(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        before = tokenizer_fingerprint(tokenizer)
        tokenizer.backend_tokenizer.enable_truncation(7)
        tokenizer.backend_tokenizer.enable_padding(length=9)
        assert tokenizer_fingerprint(tokenizer) == before

    def test_files_of_the_same_tokenizer(self, folder: Path, tmp_path: Path) -> None:
        """As different converters write it."""
        content = json.loads((folder / "tokenizer.json").read_text())
        content["added_tokens"].append(content["added_tokens"][0] | {"id": 320, "content": "<|extra|>"})
        (folder / "tokenizer.json").write_text(json.dumps(content))
        content["model"]["vocab"]["<|extra|>"] = 320
        for token in content["added_tokens"]:
            token["special"] = False
        content["model"]["unk_token"] = "<|endoftext|>"
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [content["pre_tokenizer"]]}
        content["post_processor"] = {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": False,
            "use_regex": True,
        }
        other = shutil.copytree(folder, tmp_path / "other")
        (other / "tokenizer.json").write_text(json.dumps(content))
        a, b = load_tokenizer(folder), load_tokenizer(other)
        for text in ("<|im_start|>user\nHi<|extra|> 12", "naïve 東京"):
            assert a.encode(text) == b.encode(text)
        assert compare_tokenizers(a, b) == []
        assert tokenizer_fingerprint(a) == tokenizer_fingerprint(b)

    def test_a_begin_token_counts(self, folder: Path, tmp_path: Path) -> None:
        changed = shutil.copytree(folder, tmp_path / "changed")
        backend = Tokenizer.from_file(str(changed / "tokenizer.json"))
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        backend.save(str(changed / "tokenizer.json"))
        assert compare_tokenizers(load_tokenizer(folder), load_tokenizer(changed)) == [
            "post_processor differs"
        ]

    def test_other_tokens(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "larger").mkdir()
        save_tokenizer(tmp_path / "larger", vocab_size=330)
        a, b = load_tokenizer(folder), load_tokenizer(tmp_path / "larger")
        assert tokenizer_fingerprint(a) != tokenizer_fingerprint(b)
        differences = compare_tokenizers(a, b, limit=3)
        assert len(differences) == 3
        assert differences[0] == "320 tokens in the one, 330 in the other"
        assert "has no id in the one, 320 in the other" in differences[1]

    def test_two_ids_exchanged(self, folder: Path, tmp_path: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["!"], vocabulary["a"] = vocabulary["a"], vocabulary["!"]
        changed = shutil.copytree(folder, tmp_path / "changed")
        (changed / "tokenizer.json").write_text(json.dumps(content))
        differences = compare_tokenizers(load_tokenizer(folder), load_tokenizer(changed))
        assert any(d.startswith("token '!' has id 3 in the one, ") for d in differences)

    def test_another_normalizer(self, folder: Path, tmp_path: Path) -> None:
        changed = shutil.copytree(folder, tmp_path / "changed")
        backend = Tokenizer.from_file(str(changed / "tokenizer.json"))
        backend.normalizer = normalizers.Lowercase()
        backend.save(str(changed / "tokenizer.json"))
        a, b = load_tokenizer(folder), load_tokenizer(changed)
        assert "normalizer differs" in compare_tokenizers(a, b)
        assert tokenizer_fingerprint(a) != tokenizer_fingerprint(b)

    def test_merges_count(self, folder: Path, tmp_path: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        merges = content["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]
        changed = shutil.copytree(folder, tmp_path / "changed")
        (changed / "tokenizer.json").write_text(json.dumps(content))
        assert compare_tokenizers(load_tokenizer(folder), load_tokenizer(changed)) == ["model.merges differs"]

    def test_chat_templates(self, tmp_path: Path) -> None:
        tokenizers = []
        for number, template in enumerate(("{{ messages }}", "{{ messages }} ", None)):
            where = tmp_path / str(number)
            where.mkdir()
            save_tokenizer(where, chat_template=template)
            tokenizers.append(load_tokenizer(where))
        assert len({chat_template_fingerprint(t) for t in tokenizers}) == 3
        assert len({tokenizer_fingerprint(t) for t in tokenizers}) == 1

    def test_without_a_backend_the_vocabulary_counts(self) -> None:
        class Plain:
            def __init__(self, vocabulary: dict[str, int]) -> None:
                self.vocabulary = vocabulary

            def get_vocab(self) -> dict[str, int]:
                return self.vocabulary

        a, b = Plain({"a": 0, "b": 1}), Plain({"b": 0, "a": 1})
        assert compare_tokenizers(a, Plain({"b": 1, "a": 0})) == []
        assert compare_tokenizers(a, b)[0] == "token 'a' has id 0 in the one, 1 in the other"
        assert tokenizer_fingerprint(a) != tokenizer_fingerprint(b)

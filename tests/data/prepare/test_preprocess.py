from __future__ import annotations

import dataclasses
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrlhf.data.indexed import IndexedReader, PackedDataset
from mrlhf.data.prepare.job import preprocess
from mrlhf.data.prepare.options import PreprocessConfig
from mrlhf.data.prepare.template import tokenizer_fingerprint
from mrlhf.errors import ConfigError, DataError, SeveralErrors

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "preprocess_data.py"
Run = Callable[..., PackedDataset]


def chats(n: int) -> list[dict[str, Any]]:
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "that",
        "reads",
        "books",
        "about",
        "robots",
        "and",
        "numbers",
        "1",
        "2",
        "3",
    ]
    return [
        {
            "messages": [
                {"role": "user", "content": f"question {i} " + " ".join(words[: 1 + i % 7])},
                {"role": "assistant", "content": f"answer {i} " + " ".join(words[i % 11 :])},
            ]
        }
        for i in range(n)
    ]


def pairs(n: int, **extra: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"question {i}?", "chosen": f"good {i} " + "yes " * (i % 9), "rejected": f"bad {i}", **extra}
        for i in range(n)
    ]


@pytest.fixture
def run(tmp_path: Path, bpe_dir: str) -> Run:
    def make(task: str, *paths: str, seq_length: int = 128, prefix: str = "out", **options: Any) -> PackedDataset:
        options = {"tokenizer": bpe_dir, **options}
        config = PreprocessConfig(
            task=task, input=paths, output_prefix=str(tmp_path / prefix), seq_length=seq_length, **options
        )
        meta = preprocess(config)[str(tmp_path / prefix)]
        data = PackedDataset.open(tmp_path / prefix, verify=True)
        assert data.meta == json.loads(json.dumps(meta))
        assert not list(tmp_path.glob(".*"))
        return data

    return make


def same_as_megatron(data: PackedDataset) -> None:
    """Stock IndexedDataset: its sequences are the samples, its documents the packs, in every file of the set."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for part, ours in (("", data.tokens), ("_loss_mask", data.mask), ("_margin", None)):
        if f"{part}.bin" not in data.meta["files"]:
            continue
        stock = IndexedDataset(data.prefix + part)
        if ours is None:
            assert [float(stock[i][0]) for i in range(len(stock))] == [
                data.margin(i) for i in range(data.num_samples // 2)
            ]
            assert np.array_equal(stock.document_indices * 2, data.doc_index)
            continue
        assert len(stock) == data.num_samples
        assert np.array_equal(stock.sequence_lengths, data.lengths) and np.array_equal(
            stock.document_indices, data.doc_index
        )
        for i in range(len(stock)):
            assert np.array_equal(stock[i], ours(i))


def samples(data: PackedDataset) -> list[tuple[list[int], list[int]]]:
    return [(data.tokens(i).tolist(), data.mask(i).tolist()) for i in range(data.num_samples)]


def test_sft_packs_hold_every_sample_once(
    run: Run, jsonl: Callable[..., str], load: Callable[[str], Any], bpe_dir: str
) -> None:
    rows = chats(200)
    data = run("sft", jsonl(rows), prefix="packed")
    loose = run("sft", jsonl(rows), prefix="loose", pack=False)
    same_as_megatron(data)
    same_as_megatron(loose)
    assert sorted(samples(data)) == sorted(samples(loose)) and loose.num_packs == loose.num_samples == 200
    totals = np.add.reduceat(data.lengths, data.doc_index[:-1])
    assert totals.max() <= 128 and data.num_packs < 120
    assert data.meta["fill_rate"] == pytest.approx(totals.sum() / (128 * data.num_packs), abs=1e-6)
    tokenizer = load(bpe_dir)
    for i, row in enumerate(rows):
        ids, mask = loose.tokens(i), loose.mask(i)
        assert ids.dtype == np.int64 and mask.dtype == np.uint8
        assert tokenizer.decode(ids[mask == 1]) == row["messages"][-1]["content"] + "<|im_end|>"
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(row["messages"], tokenize=False).removesuffix(
            "\n"
        )
    meta = data.meta
    assert (meta["task"], meta["num_rows"], meta["num_kept"], meta["drops"]) == ("sft", 200, 200, {})
    assert meta["num_tokens"] == data.lengths.sum() and meta["num_trained_tokens"] == sum(
        sum(m) for _, m in samples(data)
    )
    assert meta["tokenizer_fingerprint"] == tokenizer_fingerprint(bpe_dir)
    assert (meta["vocab_size"], meta["end_token"]) == (len(tokenizer), "<|im_end|>")
    assert meta["sources"][0]["bytes"] == os.path.getsize(meta["sources"][0]["path"])
    assert data.lengths.dtype == np.int32 and data.doc_index.dtype == np.int64


def test_workers_do_not_change_a_byte(run: Run, jsonl: Callable[..., str], tmp_path: Path) -> None:
    path = jsonl(chats(900))
    one, three = run("sft", path, prefix="one", workers=1), run("sft", path, prefix="three", workers=3)
    for suffix in (*one.meta["files"], ".json"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"three{suffix}").read_bytes(), suffix
    assert three.num_samples == 900
    other = run("sft", path, prefix="other", seed=2)
    assert samples(other) != samples(one) and sorted(samples(other)) == sorted(samples(one))


def test_pretrain_splits_long_texts_and_loses_nothing(
    run: Run, jsonl: Callable[..., str], load: Callable[[str], Any], bpe_dir: str
) -> None:
    texts = ["the end. " * n for n in (1, 3, 40, 100)] + ["x" * 129 + "y", "déjà vu 京🙂"]
    tokenizer = load(bpe_dir)
    whole = [[*tokenizer(t)["input_ids"], tokenizer.eos_token_id] for t in texts]
    for seq_length in (7, 16, len(whole[2]) - 1):
        data = run("pretrain", jsonl([{"text": t} for t in texts]), seq_length=seq_length, pack=False, overwrite=True)
        found: list[list[int]] = [[]]
        for i in range(data.num_samples):
            assert data.mask(i).tolist() == [0] + [1] * (data.lengths[i] - 1) and data.lengths[i] >= 2
            found[-1] += data.tokens(i).tolist()
            if found[-1][-1] == tokenizer.eos_token_id:
                found.append([])
        assert found[:-1] == whole
        assert data.meta["num_truncated"] > 0 and data.meta["num_tokens"] == sum(map(len, whole))
    packed = run("pretrain", jsonl([{"text": t} for t in texts]), seq_length=16, overwrite=True)
    same_as_megatron(packed)
    assert packed.meta["num_tokens"] == sum(map(len, whole))


def test_preference_keeps_pairs_together(
    run: Run, jsonl: Callable[..., str], load: Callable[[str], Any], bpe_dir: str
) -> None:
    rows = [{**row, "margin": i / 4} for i, row in enumerate(pairs(60))]
    data = run("preference", jsonl(rows), seq_length=200)
    same_as_megatron(data)
    assert data.num_samples == 120 and data.meta["num_pairs"] == 60 and (data.doc_index % 2 == 0).all()
    assert np.add.reduceat(data.lengths, data.doc_index[:-1]).max() <= 200 and data.num_packs < 40
    tokenizer = load(bpe_dir)
    for pair in range(60):
        row = rows[int(data.margin(pair) * 4)]
        for i, answer in ((2 * pair, row["chosen"]), (2 * pair + 1, row["rejected"])):
            assert tokenizer.decode(data.tokens(i)[data.mask(i) == 1]) == answer + "<|im_end|>"
            assert row["prompt"] in tokenizer.decode(data.tokens(i)[data.mask(i) == 0])
    assert run("preference", jsonl(pairs(3)), prefix="none").margin(0) is None


def test_prompts_keep_their_order_and_labels(
    run: Run, jsonl: Callable[..., str], load: Callable[[str], Any], bpe_dir: str
) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"what is {i}?"}], "label": {"n": i, "s": "é\u2028"}}
        for i in range(300)
    ]
    data = run("prompts", jsonl(rows), seq_length=64)
    same_as_megatron(data)
    assert (
        not data.has_mask
        and data.num_packs == data.num_samples == 300
        and [data.label(i) for i in range(300)] == [r["label"] for r in rows]
    )
    tokenizer = load(bpe_dir)
    for i in (0, 7, 299):
        assert tokenizer.decode(data.tokens(i)) == f"<|im_start|>user\nwhat is {i}?<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(DataError, match="no loss mask"):
        data.mask(0)
    bare = run("prompts", jsonl([{"input": "q"}]), prefix="bare")
    assert bare.label(0) is None and "_labels.jsonl" not in bare.meta["files"]


def test_plain_template_and_unigram(
    run: Run, jsonl: Callable[..., str], load: Callable[[str], Any], unigram_dir: str
) -> None:
    rows = [{"input": f"who {i}", "output": f"that is {i}"} for i in range(20)]
    data = run("sft", jsonl(rows), tokenizer=unigram_dir, input_template="User: {}\nAssistant: ", pack=False)
    tokenizer = load(unigram_dir)
    for i, row in enumerate(rows):
        ids, mask = data.tokens(i), data.mask(i)
        assert tokenizer.decode(ids[mask == 1]).strip() == row["output"] + "</s>"
        assert ids[0] == tokenizer.bos_token_id and mask[0] == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_sources(run: Run, jsonl: Callable[..., str], tmp_path: Path, workers: int) -> None:
    rows = chats(6)
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows[2:4]))
    zipped = tmp_path / "rows.jsonl.gz"
    zipped.write_bytes(gzip.compress("\n\n".join(json.dumps(r) for r in rows[4:]).encode()))
    data = run(
        "sft", jsonl(["\ufeff" + json.dumps(rows[0]), rows[1]]), str(array), str(zipped), pack=False, workers=workers
    )
    assert samples(data) == samples(run("sft", jsonl(rows, "all.jsonl"), pack=False, prefix="all"))
    assert [s["path"] for s in data.meta["sources"]][1:] == [str(array), str(zipped)]


def test_parquet_without_pyarrow_names_the_extra(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install 'mrlhf\[data\]'"):
        run("sft", str(tmp_path / "x.parquet"))


def test_every_kind_of_problem_is_shown_at_once_with_counts(
    run: Run, jsonl: Callable[..., str], tmp_path: Path
) -> None:
    good = chats(3)
    path = jsonl(
        [
            good[0],
            "{bad json",
            {"id": 1, "conversation": good[1]["messages"]},
            good[2],
            '{"id": 2, "conversation": []}',
            "[1]",
        ]
    )
    with pytest.raises(SeveralErrors) as caught:
        run("sft", path)
    text = str(caught.value)
    assert f"DataError: {path}:2: not valid JSON" in text and "(1 of 6 rows have this problem; first: 2)" in text
    assert f"{path}:3: column 'messages' is missing; found ['conversation', 'id']" in text
    assert "fix:      --input-key conversation     (2 of 6 rows have this problem; first: 3, 5)" in text
    assert f"{path}:6: the row is a list, not a JSON object" in text
    assert list(tmp_path.iterdir()) == [Path(path)]


def test_bad_utf8_and_null_are_row_problems(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n{"text": null}\n')
    with pytest.raises(SeveralErrors) as caught:
        run("pretrain", str(path))
    assert f"{path}:2: not valid JSON" in str(caught.value) and f"{path}:3: column 'text' is null" in str(caught.value)


def test_wrong_options_are_shown_together(run: Run, bpe_dir: str) -> None:
    with pytest.raises(SeveralErrors) as caught:
        run("prompts", "/no/file.jsonl", seq_length=0, truncate="right", workers=0, tokenizer="/no/tokenizer")
    text = str(caught.value)
    for part in ("/no/file.jsonl", "--seq-length 0", "--truncate right", "--workers 0", "/no/tokenizer"):
        assert part in text
    with pytest.raises(ConfigError, match="exclude each other"):
        run("sft", __file__, chat_template=__file__, input_template="{}")


def test_empty_turns(run: Run, jsonl: Callable[..., str]) -> None:
    rows = [*chats(4), {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}]
    with pytest.raises(DataError, match="message 1 .* is empty") as caught:
        run("sft", jsonl(rows))
    assert "--on-empty drop" in caught.value.fix
    data = run("sft", jsonl(rows), on_empty="drop")
    assert data.meta["drops"] == {"empty": 1} and data.num_samples == 4 and data.meta["num_rows"] == 5


def test_truncation_of_chats(run: Run, jsonl: Callable[..., str]) -> None:
    path = jsonl(
        [
            {"input": "please " * 30, "output": "yes no"},
            {"input": "hello", "output": "maybe " * 90},
            {"input": "the", "output": "a"},
        ]
    )
    full = run("sft", path, seq_length=1000, prefix="full", pack=False)
    limit = 64
    assert full.lengths[:2].min() > limit > full.lengths[2]
    dropped = run("sft", path, seq_length=limit, prefix="drop")
    assert dropped.meta["drops"] == {"too_long": 2} and dropped.num_samples == 1
    with pytest.raises(DataError, match="tokens") as caught:
        run("sft", path, seq_length=limit, prefix="error", truncate="error")
    assert "--truncate drop" in caught.value.fix and "2 of 3 rows" in caught.value.fix
    left = run("sft", path, seq_length=limit, prefix="left", truncate="left", pack=False)
    assert left.meta["drops"] == {"answer_too_long": 1} and left.meta["num_truncated"] == 1
    assert (
        left.tokens(0).tolist() == full.tokens(0)[-limit:].tolist()
        and left.mask(0).tolist() == full.mask(0)[-limit:].tolist()
    )
    right = run("sft", path, seq_length=limit, prefix="right", truncate="right", pack=False)
    assert right.meta["drops"] == {"nothing_left_to_train": 1} and right.meta["num_truncated"] == 1
    assert right.tokens(0).tolist() == full.tokens(1)[:limit].tolist()


def test_truncation_of_pairs_and_prompts(run: Run, jsonl: Callable[..., str]) -> None:
    path = jsonl(pairs(1, prompt="please " * 12))
    full = run("preference", path, seq_length=1000, prefix="full")
    limit = 100
    assert full.lengths.max() <= limit < full.lengths.sum()
    with pytest.raises(DataError, match=r"nothing is left of 1 rows \(too_long 1\)"):
        run("preference", path, seq_length=limit, prefix="drop")
    assert run("preference", path, seq_length=limit, prefix="loose", pack=False).num_packs == 1
    left = run("preference", path, seq_length=limit, prefix="left", truncate="left")
    assert (
        left.lengths.sum() <= limit
        and left.mask(0).sum() == full.mask(0).sum()
        and left.mask(1).sum() == full.mask(1).sum()
    )
    assert len(full.tokens(0)) - len(left.tokens(0)) == len(full.tokens(1)) - len(left.tokens(1))

    prompts = jsonl([{"input": "please " * 40}, {"input": "hi"}])
    assert run("prompts", prompts, seq_length=20, prefix="p").meta["drops"] == {"too_long": 1}
    tail = run("prompts", prompts, seq_length=20, prefix="q", truncate="left")
    whole = run("prompts", prompts, seq_length=1000, prefix="r")
    assert tail.tokens(0).tolist() == whole.tokens(0)[-20:].tolist()


def test_margins_in_some_rows_only_is_an_error(run: Run, jsonl: Callable[..., str]) -> None:
    with pytest.raises(DataError, match="1 of 3 pairs have a margin"):
        run("preference", jsonl([*pairs(2), *pairs(1, margin=1.0)]))


def test_special_tokens_beside_private_characters_are_a_counted_drop(
    run: Run, jsonl: Callable[..., str], unigram_dir: str
) -> None:
    rows = [
        *chats(3),
        {"input": "strike <s> this \U00100000", "output": "ok"},
        {"input": "strike <s> this", "output": "ok"},
    ]
    data = run(
        "sft",
        jsonl([{"input": m["messages"][0]["content"], "output": "ok"} for m in rows[:3]] + rows[3:]),
        tokenizer=unigram_dir,
    )
    assert data.meta["drops"] == {"special_in_text": 1} and data.num_samples == 4


def test_existing_output_is_kept_unless_overwritten(run: Run, jsonl: Callable[..., str], tmp_path: Path) -> None:
    run("preference", jsonl(pairs(3, margin=1.0)))
    before = {p.name: p.read_bytes() for p in tmp_path.glob("out*")}
    with pytest.raises(DataError, match="output exists already: out.bin, .*out.json") as caught:
        run("sft", jsonl(chats(3)))
    assert "--overwrite" in caught.value.fix
    with pytest.raises(DataError, match="is missing"):
        run("sft", jsonl([{"x": 1}]), overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("out*")} == before
    assert run("sft", jsonl(chats(3)), overwrite=True).task == "sft"
    assert not (tmp_path / "out_margin.bin").exists()


def test_interrupted_write_leaves_no_set_and_resumes(
    run: Run, jsonl: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.replace, []

    def failing(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 3:  # the shard, the first file of the set, the second
            raise OSError("disk gone")
        real(source, target)

    path = jsonl(chats(3))
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk gone"):
        run("sft", path)
    monkeypatch.undo()
    assert not (tmp_path / "out.json").exists()
    with pytest.raises(DataError, match="not finished by"):
        PackedDataset.open(tmp_path / "out")
    with pytest.raises(DataError, match="(?s)unfinished work.*--resume"):
        run("sft", path, prefix="out", overwrite=False) if not (tmp_path / "out.bin").unlink() else None
    with pytest.raises(DataError, match="other options"):
        run("sft", path, resume=True, loss_on="all")
    resumed = run("sft", path, resume=True)
    assert samples(resumed) == samples(run("sft", path, prefix="whole"))


@pytest.mark.parametrize("suffix", [".bin", ".idx", "_loss_mask.bin", "_loss_mask.idx"])
def test_damage_is_found_at_opening(suffix: str, run: Run, jsonl: Callable[..., str], tmp_path: Path) -> None:
    run("sft", jsonl(chats(30)))
    path = tmp_path / f"out{suffix}"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(DataError, match=f"out{suffix}.*truncated"):
        PackedDataset.open(tmp_path / "out")
    with pytest.raises(DataError, match="truncated"):
        IndexedReader(str(path).removesuffix(path.suffix))
    path.write_bytes(whole[:60] + bytes([whole[60] ^ 1]) + whole[61:])
    with pytest.raises(DataError, match="damaged|contradict"):
        PackedDataset.open(tmp_path / "out", verify=True)
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        PackedDataset.open(tmp_path / "out")


def test_siblings_of_another_run_are_found(run: Run, jsonl: Callable[..., str], tmp_path: Path) -> None:
    run("sft", jsonl(chats(30)))
    run("sft", jsonl(chats(30)), prefix="other", seed=5)
    for kind in ("bin", "idx"):
        (tmp_path / f"out_loss_mask.{kind}").write_bytes((tmp_path / f"other_loss_mask.{kind}").read_bytes())
    with pytest.raises(DataError, match="disagree|promises"):
        PackedDataset.open(tmp_path / "out")


def test_opening_what_is_not_a_prefix(run: Run, jsonl: Callable[..., str], tmp_path: Path) -> None:
    run("sft", jsonl(chats(3)))
    with pytest.raises(DataError, match="leave out .bin"):
        PackedDataset.open(tmp_path / "out.bin")
    with pytest.raises(DataError, match="no such dataset"):
        PackedDataset.open(tmp_path / "absent")
    meta = json.loads((tmp_path / "out.json").read_text())
    (tmp_path / "out.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(DataError, match="format 99"):
        PackedDataset.open(tmp_path / "out")


def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_command_line(jsonl: Callable[..., str], tmp_path: Path, bpe_dir: str) -> None:
    path = jsonl([{"input": "who?", "output": "that is me"}, {"input": "x " * 99, "output": "y"}])
    common = ("--task", "sft", "--input", path, "--tokenizer", bpe_dir, "--output-prefix", str(tmp_path / "cli"))
    done = tool(*common, "--seq-length", "32", "--input-template", r"User: {}\nAssistant: ", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "2 read, 1 kept, 1 dropped (too_long 1)" in done.stdout
    assert "User: who?\nAssistant:[[ that is me<|endoftext|>]]" in done.stdout
    assert PackedDataset.open(tmp_path / "cli").num_samples == 1

    failed = tool(*common, "--seq-length", "32", "--input-key", "question", "--overwrite")
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert failed.stderr.startswith(f"DataError: {path}:1: column 'question' is missing; found ['input', 'output']")
    assert "--input-key" in failed.stderr and failed.stderr.count("DataError") == 1
    assert PackedDataset.open(tmp_path / "cli").num_samples == 1


def test_help_is_fast_and_misuse_exits_with_2() -> None:
    shown = tool("--help")
    assert shown.returncode == 0
    for option in dataclasses.fields(PreprocessConfig):
        assert "--" + option.name.replace("_", "-") in shown.stdout
    assert tool("--task", "sft").returncode == 2


def test_modules_import_neither_torch_nor_megatron_nor_transformers() -> None:
    code = (
        "import sys; sys.path.insert(0, '.');"
        "import mrlhf.data.prepare.job, mrlhf.data.indexed, mrlhf.data.prepare.template, "
        "mrlhf.data.prepare.sources, mrlhf.data.prepare.formats;"
        "import mrlhf.data.pack;"
        "print([m for m in ('torch', 'megatron', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout.strip()
        == "[]"
    )

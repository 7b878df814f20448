"""A bare sentencepiece `.model` file as a fast HF tokenizer, proved equal to sentencepiece itself on probe texts.

transformers 5.19.0 also loads a directory that holds only tokenizer.model, but its generic converter
(SpmConverter.build_tokenizer_from_spm_proto) leaves out the model's own normalisation, the blank before a text and
collapsed blanks, so its ids silently differ from sentencepiece's.
"""

from __future__ import annotations

from typing import Any

from mrlhf.data.tokenizers.encoder import PROBES
from mrlhf.errors import DataError, EnvironmentProblem

_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
# A character that the model maps to another, followed by a combining mark: the tokenizers library, and so every fast
# tokenizer of such models, loses the mark; sentencepiece keeps it.
_LOSES_A_MARK = "\u1e9b\u0323"


def from_sentencepiece(path: str) -> Any:
    """The tokenizer of the model file `path`. Raises DataError where it is none, or cannot be converted exactly."""
    from transformers import PreTrainedTokenizerFast

    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2 as messages
    except ImportError as error:
        raise EnvironmentProblem(f"reading {path} needs sentencepiece and protobuf",
                                 fix="pip install sentencepiece protobuf") from error
    with open(path, "rb") as file:
        content = file.read()
    try:
        original = sentencepiece.SentencePieceProcessor(model_proto=content)
        proto = messages.ModelProto.FromString(content)  # type: ignore[attr-defined]  # made at run time
    except Exception as error:  # both raise their own kinds for a file that is something else
        raise DataError("not a sentencepiece model", where=path, expected="a .model file of sentencepiece",
                        fix="--tokenizer DIR") from error

    kinds = {_UNIGRAM: _unigram, _BPE: _bpe}
    if proto.trainer_spec.model_type not in kinds or proto.trainer_spec.treat_whitespace_as_suffix:
        raise DataError("a sentencepiece model of this kind is not supported", where=path, expected="unigram or BPE",
                        fix="--tokenizer DIR")
    names = {"bos_token": original.bos_id(), "eos_token": original.eos_id(), "unk_token": original.unk_id(),
             "pad_token": original.pad_id()}
    special = {name: original.id_to_piece(i) for name, i in names.items() if i >= 0}
    backend = _backend(proto, kinds[proto.trainer_spec.model_type](proto))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path=path, **special)
    for text in (t.replace(_LOSES_A_MARK, "") for t in PROBES):
        expected, ids = original.encode(text), tokenizer(text, add_special_tokens=False)["input_ids"]
        if expected != ids:
            difference = f"{text[:40]!r} becomes {ids[:8]}, sentencepiece gives {expected[:8]}"
            raise DataError(f"the model cannot be converted exactly: {difference}", where=path,
                            expected="a directory with tokenizer.json",
                            fix="convert it with the model's own transformers class and save_pretrained")
    return tokenizer


def _unigram(proto: Any) -> Any:
    from tokenizers import models

    pieces = [(p.piece, p.score) for p in proto.pieces]
    return models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=proto.trainer_spec.byte_fallback)


def _bpe(proto: Any) -> Any:
    """Merges in the order of the merged pieces' scores; for one piece, those of the earlier parts first."""
    from tokenizers import models

    ids = {p.piece: i for i, p in enumerate(proto.pieces)}
    mergeable = {p.piece for p in proto.pieces if p.type not in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)}
    merges = []
    for piece in sorted(mergeable, key=lambda p: (-proto.pieces[ids[p]].score, ids[p])):
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += sorted(((a, b) for a, b in halves if a in mergeable and b in mergeable),
                         key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece
    return models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback)


def _backend(proto: Any, model: Any) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    spec = proto.normalizer_spec
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend("▁")] if spec.add_dummy_prefix else []
    steps += [normalizers.Replace(" ", "▁")] if spec.escape_whitespaces else []
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(steps)
    if proto.trainer_spec.byte_fallback and proto.trainer_spec.model_type == _UNIGRAM:
        backend.pre_tokenizer = pre_tokenizers.Split(
            Regex("(?<=<)0x[0-9A-F]{2}>"), "isolated"
        )  # or the text "<0x0A>" would be a byte's piece
    blank = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *blank])
    backend.add_special_tokens(
        [AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type in (_UNKNOWN, _CONTROL)]
    )
    backend.add_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == _USER_DEFINED])
    return backend

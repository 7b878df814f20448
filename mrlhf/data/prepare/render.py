"""Chat templates as transformers renders them: the same sandbox, filters, functions and {% generation %} tag."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import threading
from datetime import datetime
from typing import Any

from mrlhf.data.prepare.formats import Message
from mrlhf.data.tokenizers.special import CLOSE, OPEN, Span
from mrlhf.errors import DataError, RowProblem

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
LIMIT_S = 10.0  # of a rendering's CPU time; real ones take 0.00003
LIMIT_BYTES = 1 << 30  # memory that a rendering may add to the process (Linux)
_PAGE = resource.getpagesize()
_LARGEST_BITS = 10_000  # of a product or a power: C works on larger ones without looking at the clock


class _TooLong(Exception):
    pass


def _raise_too_long(*_: object) -> None:
    raise _TooLong


class _Limits:
    """Limits time and memory of its block, in the main thread only: no other receives signals. Costs 12 µs."""

    def __enter__(self) -> None:
        self.before: tuple[int, int] | None = None
        self.timed = threading.current_thread() is threading.main_thread()
        if not self.timed:
            return
        if signal.getsignal(signal.SIGVTALRM) is not _raise_too_long:
            signal.signal(signal.SIGVTALRM, _raise_too_long)
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        if sys.platform == "linux" and soft == resource.RLIM_INFINITY:  # a limit that is set already also serves
            file = os.open("/proc/self/statm", os.O_RDONLY)
            pages = int(os.read(file, 64).split(None, 1)[0])
            os.close(file)
            self.before = soft, hard
            resource.setrlimit(resource.RLIMIT_AS, (pages * _PAGE + LIMIT_BYTES, hard))
        signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_S)

    def __exit__(self, *_: object) -> None:
        if self.timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if self.before is not None:
            resource.setrlimit(resource.RLIMIT_AS, self.before)


class ChatTemplate:
    """A Jinja chat template. Can be pickled.

    variables  the names it may use besides messages (bos_token, ...)
    where      its origin, for errors
    It is compiled at the first rendering.
    """

    def __init__(self, source: str, variables: dict[str, Any], *, where: str = ""):
        self.source, self.variables, self.where = source, variables, where
        self.marked = _GENERATION.search(source) is not None
        self._compiled: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_compiled": None}

    def render(
        self, messages: list[Message], *, tools: list[Any] | None = None, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text, and the spans of its {% generation %} blocks. Strings in `messages` hold no OPEN or CLOSE.

        Raises RowProblem, and DataError where a rendering in the main thread takes more than LIMIT_S or LIMIT_BYTES.
        """
        from jinja2 import TemplateError

        try:
            with _Limits():
                if self._compiled is None:
                    self._compiled = compile_template(self.source)
                text = self._compiled.render(messages=messages, tools=tools, documents=None,
                                             add_generation_prompt=add_generation_prompt, **self.variables)
        except (TemplateError, TypeError, KeyError, IndexError, ValueError, AttributeError, ArithmeticError,
                RecursionError) as error:
            raise RowProblem(
                "template", f"the chat template refuses this conversation: {error}",
                expected=f"roles and order the template knows; here {[m.get('role') for m in messages][:8]}",
                fix="--chat-template FILE"
            ) from error
        except (_TooLong, MemoryError) as error:
            what = (f"took more than {LIMIT_BYTES / 2**20:,.0f} MiB"
                    if isinstance(error, MemoryError) else f"did not end within {LIMIT_S:g} s")
            raise DataError(f"its chat template {what} on {[m.get('role') for m in messages][:8]}", where=self.where,
                            expected="some microseconds and kilobytes: read the template before you use it",
                            fix="--chat-template FILE") from None
        return _take_out_marks(text) if self.marked else (text, [])


def _take_out_marks(text: str) -> tuple[str, list[Span]]:
    parts: list[str] = []
    spans: list[Span] = []
    length = 0
    for piece in text.split(OPEN):
        inside, closed, behind = piece.partition(CLOSE)
        if closed:
            spans.append((length, length + len(inside)))
        parts += (inside, behind)
        length += len(inside) + len(behind)
    return "".join(parts), spans


def compile_template(source: str) -> Any:
    """Equivalent to transformers' private compiler, except that OPEN and CLOSE mark a generation block in the text."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return OPEN + caller() + CLOSE

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
                if bits > _LARGEST_BITS:
                    raise OverflowError(f"a number of more than {_LARGEST_BITS:,} bits")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
               sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)

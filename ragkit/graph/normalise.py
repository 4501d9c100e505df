"""Two ways to bring names to one form: a Unicode-aware one, and GFM-RAG v1's."""

from __future__ import annotations

import re
import unicodedata


class _Spacing(dict[int, str]):
    """Code point -> what stands for it; filled as code points are met, so that `str.translate` stays fast."""

    def __missing__(self, code: int) -> str:
        kind = unicodedata.category(chr(code))
        if kind == "Cf":  # soft hyphens and joiners are part of a word's spelling, not a gap in it
            value = ""
        else:
            value = " " if kind[0] in "PZC" else chr(code)
        self[code] = value
        return value


_SPACING = _Spacing()


def normalise(name: str) -> str:
    """One form for all spellings of a name, in any script.

    Compatibility forms and case are folded (NFKC, casefold), punctuation and control characters become spaces, runs
    of spaces one space. Letters, digits, accents and symbols (`c++`) stay. Applying it twice changes nothing.

    Args:
        name: Any text.

    Returns:
        The form; empty where the name is nothing but punctuation.

    Example:
        >>> normalise("  São  Paulo (Brazil) ")
        'são paulo brazil'
        >>> normalise("北京")
        '北京'
    """
    for _ in range(4):  # folding can make new compatibility forms; two rounds settle all but contrived names
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
        folded = " ".join(folded.translate(_SPACING).split())
        if folded == name:
            break
        name = folded
    return name


_V1_BAD = re.compile("[^A-Za-z0-9 ]")


def v1_name(name: str) -> str:
    """GFM-RAG v1's `processing_phrases`, to the character.

    Lower case; every character but ASCII letters, digits and the space becomes one space (runs are not collapsed);
    spaces at the ends go. Text in other scripts is lost: `"北京"` gives `""`, `"São Paulo"` gives `"s o paulo"`.
    """
    return _V1_BAD.sub(" ", name.lower()).strip()

"""Files of text: which ones a name stands for, what they are, their encoding, their documents; and the account of what
was read, left out and altered on the way.

Hidden files are left out and links followed, each real file once. Compressed files are known by how they begin, and so
is what is no text: in a folder it is skipped and counted, named directly it is refused. Bytes that the encoding does
not know become lone surrogates here, so that `repair` can count them. Next: columns.py.
"""

import bz2
import codecs
import collections
import glob
import gzip
import io
import lzma
import os
import re
import zlib
from pathlib import Path

from errors import UserError, alike_there, one_line, progress

SHARE = 0.01  # of the characters of a file, or of its rows, that may be damaged
BLOCK = 2**24  # characters of a text file read at a time
HEAD = 2**16  # bytes that show what a file is
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
PACKED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0", ".zst": b"\x28\xb5\x2f\xfd"}
LFS, FETCH = "Git LFS pointer", "fetch what it stands for:  git lfs pull"
# (where, what stands there, what that is); all others that are no text are binary files
KINDS = ((0, b"PK\3\4", "zip archive"), (0, b"PK\5\6", "zip archive"), (0, b"7z\xbc\xaf", "7z archive"),
         (0, b"Rar!", "rar archive"), (257, b"ustar", "tar archive"), (0, b"%PDF-", "PDF"), (0, b"\x89PNG", "picture"),
         (0, b"\xff\xd8\xff", "picture"), (0, b"GIF8", "picture"), (0, b"BM", "picture"), (0, b"II*\0", "picture"),
         (0, b"MM\0*", "picture"), *((0, b"P%d\n" % i, "netpbm picture") for i in (4, 5, 6)), (4, b"ftyp", "video"),
         (0, b"\x7fELF", "program"),
         (0, b"SQLite format 3", "SQLite database"), (0, b"\x80\4\x95", "pickle"), (0, b"PAR1", "parquet file"),
         (0, b"version https://git-lfs", LFS), *((0, magic, "archive packed twice") for magic in PACKED.values()))
LINE_END = "(?>\r\n|\r|\n)"
HALF = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # of a surrogate pair, which JSON can hold
ESCAPES = re.compile(r"\\(\\|[nrtfv0]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})")
MARKERS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<doc", "\f", "\x1e")  # separators that no prose has
COMMON = (*MARKERS, "\n\n\n", "\n\n", "\n---\n", "\0")  # separators of texts
BACKUPS = ("~", ".bak", ".tmp", ".swp")  # ends of names, those of half written files too


class Account:
    """What was read, left out and altered: {subject: {what: how often}}, the first names of each, and how."""

    def __init__(self, before=None):
        """before: the account of an earlier time that the same is read."""
        self.counts, self.names, self.about = collections.defaultdict(collections.Counter), {}, {}
        # What has been printed, and the files that were given by their own name.
        self.said, self.named = (before.said, before.named) if before else (set(), set())
        self.characters = self.wrong = 0  # wrong: NULs and what had to be replaced
        self.encoding, self.unsplit = None, ""  # of the last file; the start of a text without the separator
        self.separator = b""  # between documents, which is no sign of a binary file
        self.markers = {}  # what should not stand in texts, and how that is told

    def add(self, subject, what, name=None, n=1):
        self.counts[subject][what] += n
        if name is not None and len(first := self.names.setdefault(f"{subject} {what}", [])) < 3:
            first.append(one_line(str(name)))

    def look(self, text):
        """Count markers in a text; if it was not UTF-8, keep the first words by which its encoding can be judged."""
        for marker, told in self.markers.items():
            if found := text.count(marker):
                self.add("markers", told, n=found)
        name = self.encoding or "utf-8"
        if len(self.names.get(f"encoding {name}", ())) < 3 and not codecs.lookup(name).name.startswith("utf-8"):
            for _, word in zip(range(3), re.finditer(r"(?<!\S)\S{0,20}?[^\s\0-\x7f]\S{0,20}", text)):
                self.add("encoding", name, word[0], 0)

    def say(self, what, line):
        """Print what is said of something the first time, by the first rank."""
        if what not in self.said and os.environ.get("RANK", "0") == "0":
            print(line, flush=True)
        self.said.add(what)

    def as_dict(self):
        return {**{subject: dict(counts) for subject, counts in self.counts.items()}, **self.about, "names": self.names}

    def lines(self):
        """The account in words, a subject a line."""
        for subject, counts in self.counts.items():
            names = {what: ", ".join(self.names.get(f"{subject} {what}", [])) for what in counts}
            yield f"{subject:9} " + ", ".join(f"{n:,} {what}" + (f" ({names[what]}" + ", ..." * (n > 3) + ")"
                                              if names[what] else "") for what, n in counts.items() if n)
        for name, part in self.about.get("installed", {}).items():
            yield f"{name:28} {part['bytes']:>11,} bytes, licence: {part['licence']}"
        for what, value in self.about.items():
            if what != "installed":
                yield f"{what:9} {'none: documents run together' if value is None else value}"


def list_files(names, pattern, account=None):
    """The files that names, folders (searched for the pattern) and globs stand for, each real file once."""
    files, account = {}, account or Account()
    for name in map(str, names):
        path, wanted, matches = Path(name), pattern, [Path(name)]
        if path.is_file():
            account.named.add(path)
        elif not path.is_dir():  # ** is searched as a folder is, since glob's own goes round in circles of links
            deep = re.fullmatch(r"(|.*?/)\*\*(?:/(.*))?", name)
            wanted = deep and deep[2] or pattern
            matches = map(Path, glob.glob(deep[1] or "." if deep else name))
        found = []
        for match in matches:
            found += walk(match, wanted, account) if match.is_dir() else [match] if match.is_file() else []
            if match.is_symlink() and not match.exists():
                account.add("files", "broken links", match)
        if not found:
            what = f"no files {path / pattern}" if path.is_dir() else f"no file or folder {name}{alike_there(name)}"
            raise UserError("; ".join([what, *account.lines()]))
        for file in sorted(found):
            if file.name.endswith(BACKUPS) and not (name.endswith(BACKUPS) or wanted.endswith(BACKUPS)):
                account.add("files", "backups, left out", file)
            elif files.setdefault(os.path.realpath(file), file) != file:
                account.add("files", "reached twice, read once", file)
    return list(files.values())


def walk(root, pattern, account):
    """Yield the files below a folder that match the pattern, those of linked folders too, but nothing that is hidden,
    unless the pattern asks for it. Each real folder is entered once, by its own path if that lies below root."""
    folders, seen, hidden = collections.deque([root]), set(), pattern.startswith(".") or "/." in pattern
    while folders:
        folder = folders.popleft()
        if (real := os.path.realpath(folder)) in seen:
            account.add("files", "linked folders that are read already", folder)
            continue
        seen.add(real)
        for entry in os.scandir(folder):
            path = folder / entry.name
            if entry.name.startswith(".") and not hidden:
                account.add("files", "hidden, left out", path)
            elif os.path.isdir(path):  # of links in a circle entry.is_dir() raises
                folders.append(path) if entry.is_symlink() else folders.appendleft(path)  # links last
            elif not os.path.isfile(path):
                account.add("files", "broken links" if entry.is_symlink() else "no regular files, left out", path)
            elif path.relative_to(root).match(pattern.removeprefix("**/")):
                yield path
            else:
                account.add("files", f"not called {pattern}, left out", path)


def _escape(error):
    """For decoders: undecodable bytes as lone surrogates, whatever the encoding."""
    return "".join(chr(0xDC00 + max(byte, 0x80)) for byte in error.object[error.start:error.end]), error.end


codecs.register_error("nanok2.escape", _escape)


def open_text(raw, path, account, encoding=None, strict=False):
    """The text of an open binary file, as a text file object with its line ends as they are; None if it is no text,
    which is counted, or with `strict` a UserError."""
    binary = _decompressed(raw, path)
    head = binary.peek(HEAD)
    found = next((name for bom, name in BOMS if head.startswith(bom)), None) or (None if encoding else _utf16(head))
    wide = encoding and codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))  # full of NULs
    try:
        plain = codecs.getincrementaldecoder("utf-8")().decode(head) if encoding and not found else ""
    except UnicodeDecodeError:
        plain = ""
    if wide and plain and "\0" not in plain:
        raise UserError(f"{path} is no {encoding} but UTF-8: leave --encoding out, or such files by --pattern")
    if plain and not wide and not plain.isascii():  # what is UTF-8 by chance is short
        found = "utf-8"
    kind = None if found or wide else _kind(head.replace(account.separator, b"") if account.separator else head)
    if kind and (strict or kind == LFS or path in account.named):
        remedy = FETCH if kind == LFS else "take the text out of it first, or say what text it is by --encoding=NAME"
        raise UserError(f"{path} is no text but {'an' if kind[0] == 'a' else 'a'} {kind}: {remedy}")
    if kind:
        account.add("files", f"skipped: {kind}", path)
        return None
    account.encoding = found or encoding or "utf-8"
    account.add("files", "read")
    account.add("encoding", account.encoding)
    return io.TextIOWrapper(binary, encoding=account.encoding, errors="nanok2.escape", newline="")


def _decompressed(binary, path):
    """A buffered reader of what `binary`, the buffered reader of that path, holds when it is unpacked."""
    suffix = next((name for name, magic in PACKED.items() if binary.peek(8).startswith(magic)), Path(path).suffix)
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}.get(suffix)
    return io.BufferedReader(opened(binary), HEAD) if opened else binary


def _open_zst(binary):
    try:
        import pyarrow  # comes with datasets
    except ImportError as error:
        raise UserError("files in .zst need a package:  pip install pyarrow  (or pack them as .gz)") from error
    return pyarrow.CompressedInputStream(binary, "zstd")


def suffix_of(path):
    """The end of a file's name, in lower case and without that of a compression."""
    return next((suffix for suffix in reversed(Path(str(path).lower()).suffixes) if suffix not in PACKED), "")


def git_lfs(path):
    """What to do about a file that is but a Git LFS pointer, None for others."""
    with open(path, "rb") as file:
        return f"it is a {LFS}: {FETCH}" if _kind(file.read(1000)) == LFS else None


def _utf16(head):
    """The UTF-16 without a byte order mark that a text in the Latin alphabet is in, by where its NULs stand."""
    low, high = head[0::2].count(0), head[1::2].count(0)
    if len(head) < 4 or len(head) % 2 or max(low, high) <= 0.3 * len(head) or min(low, high) > 0.01 * len(head):
        return None
    return "utf-16-le" if high > low else "utf-16-be"


def _kind(head):
    """What a file is that begins so, if that is no text, else None."""
    known = next((kind for at, magic, kind in KINDS if head.startswith(magic, at)), None)
    control = len(head) - len(head.translate(None, bytes([*range(9), *range(14, 27)])))
    if known and (control or known in (LFS, "PDF", "netpbm picture")):
        return known
    return "binary file" if control > 0.02 * len(head) else None


def each_file(files, parts, account, encoding=None, strict=False):
    """Yield what parts(text file, path) yields of every file. Whoever takes the parts lets `repair` count what is wrong
    with them: a file with more of that than SHARE is an error."""
    with progress("reading", sum(path.stat().st_size for path in files if path.exists())) as bar:
        for path in files:
            characters, wrong, done = account.characters, account.wrong, bar.n
            try:
                with open(path, "rb", buffering=HEAD) as raw:
                    size = os.fstat(raw.fileno()).st_size
                    file = open_text(raw, path, account, encoding, strict) if size else None
                    if not size:
                        account.add("files", "empty", path)
                    for part in parts(file, path) if file else ():
                        yield part
                        bar.update(done + raw.tell() - bar.n)
                        if account.characters - characters > 2**20:
                            check_share(path, account, characters, wrong)
                    if os.fstat(raw.fileno()).st_size != size:
                        account.add("files", "changed while they were read", path)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
            check_share(path, account, characters, wrong)


def check_share(path, account, characters=0, wrong=0):
    """Raise UserError if too much is wrong with what was read since the account had counted these numbers."""
    characters, wrong = account.characters - characters, account.wrong - wrong
    if wrong > SHARE * characters:
        what = f"bytes that are no {account.encoding}: set --encoding=NAME, as cp1252 or gb18030, or --pattern"
        if account.about.get("column") and not account.counts["altered"]["undecodable characters replaced"]:
            what = "the like: take them out of the texts of that column first"  # of JSON's escapes
        raise UserError(f"{path}: {wrong:,} of {characters:,} characters ({wrong / characters:.0%}) are NULs or {what}")


def split_text(file, path=None, separator=None, account=None):
    """Yield the documents of a text file: all of it, or the parts between separators."""
    if not separator:
        yield file.read()
        return
    account = account or Account()
    pattern, rest, found, start = separator_pattern(separator), "", 0, ""
    while block := file.read(BLOCK):
        while block.endswith("\r") and (more := file.read(1)):  # no line end is torn apart
            block += more
        start = start or block[:2**20]
        *whole, rest = pattern.split(rest + block)
        found += len(whole)
        yield from whole
    account.add("separator", "found", n=found)
    account.add("separator", "texts with it" if found else "texts without it", path)
    account.unsplit = account.unsplit or start
    yield rest


def check_separator(separator, account):
    """Raise UserError if the separator was found nowhere, with what there is instead."""
    if not account.unsplit or account.counts["separator"]["found"]:
        return
    text, plain = account.unsplit, unescape(separator)
    ends = collections.Counter(map(repr, re.findall(LINE_END, text)))
    similar = re.findall(re.escape(plain.strip()), text, re.I)[:1] if plain.strip() else []
    other = [repr(word) for word in (*similar, *COMMON) if separator_pattern(word).search(text)]
    raise UserError(
        f"the separator {plain!r} occurs nowhere in {account.counts['separator']['texts without it']} files, the first "
        f"of which begins {text[:40]!r}, with the line ends {', '.join(ends) or 'none'} and {', '.join(other) or 'no'} "
        r"known separators: set --split_on (in which \n is a line end and \\ is a backslash), or leave it out")


def unescape(text):
    r"""The text with \n, \r, \t, \f, \v, \0, \xHH and \uHHHH as the characters that they mean, \\ as one backslash."""
    return ESCAPES.sub(lambda match: match[0].encode().decode("unicode_escape"), text)


def separator_pattern(separator):
    """What finds a separator, with any line ends where it has some; a lone carriage return means itself."""
    separator = separator.replace("\r\n", "\n")
    return re.compile(re.escape(separator) if "\r" in separator else
                      LINE_END.join(map(re.escape, separator.split("\n"))))


def repair(text, line_ends=False):
    """(text as it is tokenised, its bytes, bytes that the text had, characters replaced). Lone surrogates, which stand
    for undecodable bytes, one each, become replacement characters; with line_ends, \\r\\n and \\r become \\n."""
    before = text.count("\ufffd")
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raw = HALF.sub("\ufffd", text).encode("utf-8", "surrogateescape")
        text = raw.decode("utf-8", "replace")
    size, replaced = len(raw), text.count("\ufffd") - before
    if line_ends:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text, text.encode(), size, replaced

"""Render the glyphs of many fonts, and split the fonts by family.

A glyph is drawn once: cropped, scaled so that its longer side has 24 pixels, centred in 32×32.
Faces of one family go together to train, validation or test, and a face of validation or test whose
probe glyphs nearly coincide with a face of an earlier split is dropped for that script, so that no
task is tested on a font it saw. Faces that disagree with the mean glyph (symbols, ciphers, other
scripts at Latin code points) are dropped.
"""

from __future__ import annotations

import random
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

SIDE, BODY, POINT = 32, 24, 48
SUFFIXES = (".ttf", ".otf", ".ttc")
SPLITS = {"train": 0.55, "validation": 0.12, "test": 0.33}
FACES_PER_GROUP = 4
ALIKE = 0.95  # cosine of the probe glyphs of two faces, above which they may not be in two splits
AGREES = 0.35  # least mean cosine of a face with the mean glyphs of its script

MARKS = "\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327\u0328"


def _span(first: int, last: int, category: str = "L") -> str:
    points = map(chr, range(first, last + 1))
    return "".join(c for c in points if unicodedata.category(c).startswith(category))


def _accents() -> str:
    """Return the Latin letters that are a plain letter and one of `MARKS`."""
    out = []
    for c in _span(0xC0, 0x17F):
        parts = unicodedata.normalize("NFD", c)
        if len(parts) == 2 and parts[1] in MARKS and parts[0] not in "iIjJ":
            out.append(c)
    return "".join(out)


def _kanji() -> str:
    """Return every seventh character of level 1 of JIS X 0208."""
    cells = [bytes((row, cell)) for row in range(0xB0, 0xCF) for cell in range(0xA1, 0xFF)]
    return b"".join(cells[::7]).decode("euc_jp")


def _hangul() -> str:
    """Return syllables of KS X 1001, at most twelve for each plain initial consonant."""
    plain = [0, 2, 3, 5, 6, 7, 9, 11, 12, 14, 15, 16, 17, 18]
    cells = [bytes((row, cell)) for row in range(0xB0, 0xC9) for cell in range(0xA1, 0xFF)]
    byinitial: dict[int, list[str]] = defaultdict(list)
    for c in b"".join(cells).decode("euc_kr"):
        byinitial[(ord(c) - 0xAC00) // 588].append(c)
    return "".join("".join(byinitial[i][:: max(1, len(byinitial[i]) // 12)][:12]) for i in plain)


# Letters that scaling makes equal to another of their list are left out.
SCRIPTS: dict[str, str] = {
    "latin": "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abdefghijmnqrty",
    "style": "ABEGHKMNQRabdeghkmnqrtu",
    "accents": _accents(),
    "greek": "ΔΘΛΞΣΨΩαβγδεζηθλμξπρσςτφχψω",
    "cyrillic": "БГДЖЗИЙЛПУФЦЧШЩЪЫЬЭЮЯб",
    "armenian": _span(0x531, 0x556, "Lu"),
    "hebrew": _span(0x5D0, 0x5EA),
    "arabic": "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "devanagari": _span(0x905, 0x90B) + _span(0x90F, 0x910) + _span(0x913, 0x928) + "पफबभमयरलवशषसह",
    "bengali": "অআইউএওকখগঘঙচছজঝঞটঠডঢণতথদধনপফবভমযরলশষসহ",
    "gurmukhi": "ਅਆਇਉਏਓਕਖਗਘਙਚਛਜਝਞਟਠਡਢਣਤਥਦਧਨਪਫਬਭਮਯਰਲਵਸਹ",
    "gujarati": "અઆઇઈઉકખગઘચછજઝઞટઠડઢણતથદધનપફબભમયરલવશષસહળ",
    "tamil": "அஆஇஈஉஎஏஐஒகஙசஞடணதநபமயரலவழளறன",
    "telugu": "అఆఇఈఉఎఒకఖగఘచఛజఝఞటఠడఢణతథదధనపఫబభమయరలవశషసహ",
    "kannada": "ಅಆಇಈಉಎಒಕಖಗಘಚಛಜಝಞಟಠಡಢಣತಥದಧನಪಫಬಭಮಯರಲವಶಷಸಹ",
    "malayalam": "അആഇഉഎഒകഖഗഘങചഛജഝഞടഠഡഢണതഥദധനപഫബഭമയരറലളഴവശഷസഹ",
    "sinhala": "අඉඋඑඔකඛගඝචඡජඤටඨඩඪණතථදධනපඵබභමයරලවශෂසහළ",
    "thai": _span(0xE01, 0xE2E).replace("ฤ", "").replace("ฦ", ""),
    "lao": "ກຂຄງຈຊຍດຕຖທນບປຜຝພຟມຢຣລວສຫອຮ",
    "tibetan": "ཀཁགངཅཆཇཉཏཐདནཔཕབམཙཚཛཝཞཟའཡརལཤསཧཨ",
    "myanmar": "ကခဂဃငစဆဇဈညဋဌဍဎဏတထဒဓနပဖဗဘမယရလဝသဟဠအ",
    "georgian": _span(0x10D0, 0x10F0),
    "ethiopic": "".join(chr(c) for c in range(0x1200, 0x1358, 8) if unicodedata.name(chr(c), "")),
    "cherokee": _span(0x13A0, 0x13F4),
    "khmer": _span(0x1780, 0x17A2),
    "hiragana": "あいうえおかきくけこさしすせそたちつてとなにぬ"
    "ねのはひふへほまみむめもやゆよらりるれろわをん",
    "katakana": "アイウエオカキクケコサシスセソタチツテトナニヌ"
    "ネノハヒフヘホマミムメモヤユヨラリルレロワヲン",
    "kanji": _kanji(),
    "hangul": _hangul(),
}
STYLES = {
    0: {"regular", "book", "roman", "medium", "normal"},
    1: {"bold"},
    2: {"italic", "oblique", "book oblique", "regular italic", "medium italic"},
    3: {"bold italic", "bold oblique", "bolditalic", "boldoblique"},
}


def style_of(name: str) -> int | None:
    """Return 0 regular, 1 bold, 2 italic, 3 bold italic, or None."""
    return next((k for k, names in STYLES.items() if name.lower() in names), None)


def _bitmap(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """Return the cropped glyph, or None if it is empty or absurdly large."""
    core = font.getmask(text, "L")
    if not (0 < core.size[0] < 400 and 0 < core.size[1] < 400):
        return None
    image = Image.frombytes("L", core.size, bytes(core))
    box = image.getbbox()
    return image.crop(box) if box else None


def _draw(font: ImageFont.FreeTypeFont, text: str, missing: set[bytes]) -> np.ndarray | None:
    crop = _bitmap(font, text)
    if crop is None or max(crop.size) < 6:
        return None
    scale = BODY / max(crop.size)
    size = (max(1, round(crop.width * scale)), max(1, round(crop.height * scale)))
    small = crop.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR)
    canvas = Image.new("L", (SIDE, SIDE))
    canvas.paste(small, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    out = np.asarray(canvas, dtype=np.uint8)
    return None if out.tobytes() in missing else out


def _missing(font: ImageFont.FreeTypeFont) -> set[bytes]:
    """Return the pictures a font draws for characters it lacks."""
    drawn = (_draw(font, c, set()) for c in ("\uffff", "\U000f1234", "\u0378"))
    return {d.tobytes() for d in drawn if d is not None}


def scan(fonts: Path) -> list[dict]:
    """Return faces (path, family, style) with their drawings of each script's probe glyphs."""
    faces = []
    paths = (p for p in fonts.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_symlink())
    for path in sorted(paths):
        try:
            font = ImageFont.truetype(path, POINT, layout_engine=ImageFont.Layout.BASIC)
            missing, probes = _missing(font), {}
            for script, letters in SCRIPTS.items():
                glyphs = [
                    _draw(font, c, missing) for c in letters[:: max(1, len(letters) // 6)][:6]
                ]
                if any(g is None for g in glyphs[:2]):
                    continue
                whole = [g for g in glyphs if g is not None]
                if len(whole) == len(glyphs) and len({g.tobytes() for g in whole}) == len(whole):
                    probes[script] = np.stack(whole)
        except OSError:  # damaged or bitmap-only: says nothing
            continue
        if probes:
            family, style = (part or "?" for part in font.getname())
            faces.append(
                {"path": str(path.relative_to(fonts)), "family": family, "style": style,
                 "probes": probes, "missing": missing}
            )  # fmt: skip
    return faces


def _vectors(images: np.ndarray) -> np.ndarray:
    """Return unit vectors [faces, glyphs, 256] of glyphs, halved in size and mean-free."""
    n, k = images.shape[:2]
    small = images.reshape(n, k, SIDE // 2, 2, SIDE // 2, 2).mean((3, 5)).reshape(n, k, -1)
    small = small - small.mean(-1, keepdims=True)
    return small / np.maximum(np.linalg.norm(small, axis=-1, keepdims=True), 1e-6)


def _agreeing(vectors: np.ndarray) -> np.ndarray:
    """Return which faces agree with the mean glyphs, dropping outliers in two rounds."""
    keep = np.ones(len(vectors), bool)
    for _ in range(2):
        mean = vectors[keep].mean(0)
        mean /= np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)
        keep = (vectors * mean).sum(-1).mean(-1) > AGREES
    return keep


def _family_keys(faces: list[dict]) -> list[str]:
    """Return the family's first word, or two where the first is a vendor's (many families)."""
    words = [f["family"].lower().replace("-", " ").split() or ["?"] for f in faces]
    families: dict[str, set[str]] = defaultdict(set)
    for face, word in zip(faces, words, strict=True):
        families[word[0]].add(face["family"])
    return [" ".join(w[: 2 if len(families[w[0]]) > 6 else 1]) for w in words]


def group(faces: list[dict]) -> None:
    """Drop scripts on which a face disagrees, and give each face its family's `group` number."""
    numbers: dict[str, int] = {}
    for face, key in zip(faces, _family_keys(faces), strict=True):
        face["group"] = numbers.setdefault(key, len(numbers))
    for script in SCRIPTS:
        who = [f for f in faces if script in f["probes"]]
        vectors = _vectors(np.stack([f["probes"][script] for f in who]))
        for face, ok in zip(who, _agreeing(vectors), strict=True):
            if not ok:
                del face["probes"][script]


def separate(faces: list[dict], roles: dict[int, str]) -> None:
    """Drop, script by script, faces that nearly coincide with a face of an earlier split."""
    for script in SCRIPTS:
        who = [f for f in faces if script in f["probes"]]
        order = np.array([list(SPLITS).index(roles[f["group"]]) for f in who])
        flat = _vectors(np.stack([f["probes"][script] for f in who])).reshape(len(who), -1)
        alike = flat @ flat.T > ALIKE * len(who[0]["probes"][script])
        for i, face in enumerate(who):
            if alike[i, order < order[i]].any():
                del face["probes"][script]


def split(faces: list[dict], seed: int = 0) -> dict[int, str]:
    """Return group → split, filling each script's shares from the rarest script on."""
    groups: dict[str, list[int]] = {
        s: sorted({f["group"] for f in faces if s in f["probes"]}) for s in SCRIPTS
    }
    role: dict[int, str] = {}
    for script in sorted(SCRIPTS, key=lambda s: (len(groups[s]), s)):
        have = Counter(role[g] for g in groups[script] if g in role)
        free = [g for g in groups[script] if g not in role]
        random.Random(f"{seed} {script}").shuffle(free)
        for g in free:
            want = {k: share * len(groups[script]) - have[k] for k, share in SPLITS.items()}
            role[g] = max(want, key=lambda k: (want[k], k))
            have[role[g]] += 1
    return role


def render(fonts: Path) -> dict:
    """Return images [N, 32, 32] with script, character, style, group and split of each glyph."""
    faces = scan(fonts)
    group(faces)
    roles = split(faces)
    separate(faces, roles)
    rng, taken = random.Random(0), Counter()
    rng.shuffle(faces)
    images, rows = [], []
    for face in faces:
        path = fonts / face["path"]
        font = ImageFont.truetype(path, POINT, layout_engine=ImageFont.Layout.BASIC)
        style = style_of(face["style"])
        for number, (script, letters) in enumerate(SCRIPTS.items()):
            slot = (face["group"], script, style if script == "style" else None)
            if script not in face["probes"] or taken[slot] >= FACES_PER_GROUP:
                continue
            if script == "style" and style is None:
                continue
            taken[slot] += 1
            for index, c in enumerate(letters):
                glyph = _draw(font, c, face["missing"])
                if glyph is not None:
                    images.append(glyph)
                    split_code = list(SPLITS).index(roles[face["group"]])
                    kind = -1 if style is None else style
                    rows.append((number, index, kind, face["group"], split_code))
    return {"images": np.stack(images), "rows": np.array(rows, dtype=np.int32), "faces": len(faces)}

"""Text of every kind, for tokenizers to agree on."""

import random
from collections.abc import Iterator

PIECES = [
    # contractions, in every case and with the wrong apostrophe
    "I'm you're he's she'd we'll they've don't 'tis O'Neil rock'n'roll DON'T I'M 's 'S 'll 're' ''",
    "it’s l’été ’em d'accord 'd've y'all'd've",
    # white space
    " ", "  ", "   \t\t  \n", "\n\n\n", "\r\n\r\n", " \n \n ", "a  b   c    d", "end   ", "\t\tx",
    "\u00a0nbsp\u00a0\u00a0", "\u3000ideographic\u3000\u3000", "\u2028line\u2029paragraph\x85next",
    "\x1c\x1d\x1e\x1f", "\x0b\x0c", "\u200bzero\u200dwidth\ufeff",
    # numbers
    "1234567890", "3.14159e-10", "1,234,567.89", "٣٤٥", "四十二", "Ⅻ ½ ² ₃ ௧", "0x1F600", "1st 2nd",
    # languages
    "Wohnungsübergabeprotokoll für Größenwahnsinnige", "Où est passé l'œuf de la poule naïve ?",
    "El pingüino comió jalapeños en la montaña.", "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Съешь ещё этих мягких французских булок", "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "дон'т о'к", "שלום עולם, מה שלומך?", "السلام عليكم ورحمة الله", "नमस्ते दुनिया, क्षत्रिय",
    "สวัสดีชาวโลก", "こんにちは世界。カタカナ", "你好，世界！今天天气很好", "안녕하세요 세계",
    "ഒരു വാക്യം", "가나다라", "ẹ̀kọ́ Yorùbá", "Tiếng Việt có dấu", "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ", "𐍈𐌰𐌹𐍂𐌷𐍄", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚",
    # symbols
    "😀😃👩‍👩‍👧‍👦🏳️‍🌈🇩🇰", "👍🏽 ok 👌", "€£¥₿ → ⇒ ∀x∈ℝ: ∃y", "«quoted» „so“ “and” ‘so’", "…—–-‐",
    "e\u0301 vs é; A\u030a vs Å vs \u212b", "\ufdfa\ufb01", "���",
    # code and markup
    "def f(x: int) -> str:\n    return f\"{x!r:>10}\"  # comment\n", "if(a&&b||!c){x+=1;}",
    "<a href=\"https://example.org/?q=1&r=2#top\">link</a>", "C:\\path\\to\\file.txt",
    "{\"k\": [1, null, true]}", "|---|:--:|", "________________________", "============", "////",
    # what is special only where it is not text
    "<|endoftext|>", "a<|endoftext|>b", "<|endoftext|", "<|im_start|>user",
    # control characters
    "\x00", "a\x00b\x01\x7f", "\x1b[31mred\x1b[0m",
]  # fmt: skip

ENGLISH = """\
The dragon that lived under the hill had never learned to read, and she minded it more than she
would say. On winter evenings, when the snow lay thick and the wind went round and round the
mountain singing, she turned the pages of the one book she had and looked at the pictures: a ship,
a tower, a girl with a lantern. "What is it that they are saying?" she asked the bats. The bats
didn't know. They hadn't been to school either. So in the spring she went down to the village and
knocked, very gently, at the schoolmaster's door.
"""


def random_texts(seed: int, count: int) -> Iterator[str]:
    """Texts that put pieces of every kind, and single characters, next to each other."""
    chance = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(chance.randint(1, 12)):
            piece = chance.choice(PIECES)
            begin = chance.randrange(len(piece))
            parts.append(piece[begin : begin + chance.randint(1, 20)])
            if chance.random() < 0.3:
                parts.append(_character(chance))
            parts.append(chance.choice(["", "", " ", "  ", "\n", "'"]))
        yield "".join(parts)


def mixed_text(seed: int, num_pieces: int) -> str:
    """One text to train on: English that repeats itself, and some of everything else."""
    chance = random.Random(seed)
    sentences = ENGLISH.split(". ")
    kinds = chance.choices([PIECES, sentences], weights=[3, 7], k=num_pieces)
    return " ".join(chance.choice(kind) for kind in kinds)


def _character(chance: random.Random) -> str:
    while True:
        code = chance.randrange(chance.choice([0x80, 0x800, 0x10000, 0x110000]))
        if not 0xD800 <= code < 0xE000:
            return chr(code)

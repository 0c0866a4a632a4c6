"""Draws docs/pipeline.svg: python docs/pipeline.py"""

from pathlib import Path

STAGES = [
    ("capture", "tokens, and q, k, v", "of every layer", "the teacher runs once"),
    ("transfer", "feature maps and γ", "of every layer", "no teacher needed"),
    ("lora", "a PEFT adapter", "and the maps", "end to end"),
    ("merge", "a Hugging Face", "model folder", "loads anywhere"),
]
BOX, GAP, TOP, HEIGHT = 150, 62, 46, 92


def text(x: float, y: float, content: str, style: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="middle" class="{style}">{content}</text>'


def arrow(x: float, y: float, length: float) -> str:
    end = x + length
    return f'<path d="M{x} {y}H{end - 7}" class="line"/><path d="M{end} {y}l-9 -5v10z" class="head"/>'


def draw() -> str:
    left = 96
    width = left + len(STAGES) * BOX + (len(STAGES) - 1) * GAP + 12
    middle = TOP + HEIGHT / 2
    parts = [
        text(46, middle - 22, "teacher", "bold"),
        text(46, middle - 5, "softmax LLM", "small"),
        text(46, middle + 18, "data", "bold"),
        text(46, middle + 35, "text, chat", "small"),
        arrow(left - 12, middle, 10),
    ]
    for i, (name, first, second, note) in enumerate(STAGES):
        x = left + i * (BOX + GAP)
        parts += [
            f'<rect x="{x}" y="{TOP}" width="{BOX}" height="{HEIGHT}" rx="8" class="box"/>',
            text(x + BOX / 2, TOP - 14, f"lolcats {name}", "code"),
            text(x + BOX / 2, TOP + 34, first, "plain"),
            text(x + BOX / 2, TOP + 54, second, "plain"),
            text(x + BOX / 2, TOP + 78, note, "small"),
        ]
        if i:
            parts.append(arrow(x - GAP + 6, middle, GAP - 12))
            parts.append(text(x - GAP / 2, middle - 10, "DIR", "code"))
    style = """
text { font-family: -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2937; }
.bold { font-size: 14px; font-weight: 600; } .plain { font-size: 14px; } .small { font-size: 11px; fill: #6b7280; }
.code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px; fill: #1d4ed8; }
.box { fill: #eff6ff; stroke: #1d4ed8; } .line { stroke: #6b7280; stroke-width: 1.5; } .head { fill: #6b7280; }
"""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 160" width="{width}" height="160">'
        f'<style>{style}</style><rect width="{width}" height="160" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")

import re
from pathlib import Path

README = Path(__file__).parents[2] / "kernels" / "flagscale_kernels" / "README.md"


def test_every_example_in_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 8
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)


def test_the_readme_has_an_example_of_every_operator():
    import flagscale_kernels

    text = README.read_text(encoding="utf-8")
    operators = [n for n in flagscale_kernels.__all__ if not n.endswith("_reference") and n != "packed_position_ids"]
    missing = [name for name in operators if f"fk.{name}(" not in text and f"`{name}(" not in text]
    assert not missing

"""Fill-in-the-middle keeps length and content, and is a pure function of seed, source and position."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.packing import FillInTheMiddle

END, PREFIX, MIDDLE, SUFFIX = 100, 101, 102, 103


class Ids:
    """The part of a tokenizer that fill-in-the-middle needs."""

    end_of_text = END

    @staticmethod
    def control_id(name: str) -> int:
        return {"<|fim_prefix|>": PREFIX, "<|fim_middle|>": MIDDLE, "<|fim_suffix|>": SUFFIX}[name]


def fim(rate: float = 1.0, spm_share: float = 0.5, seed: int = 0, source: str = "code") -> FillInTheMiddle:
    return FillInTheMiddle(rate, spm_share, Ids(), seed, source)


def restored(ids: list[int]) -> tuple[list[int], str]:
    """The tokens in their original order, and the form that they had."""
    at = {name: ids.index(name) for name in (PREFIX, MIDDLE, SUFFIX)}
    assert at[PREFIX] == 0
    assert sum(ids.count(name) for name in at) == 3
    middle, suffix = ids[at[MIDDLE] + 1 :], ids[at[SUFFIX] + 1 : at[MIDDLE]]
    return ids[1 : at[SUFFIX]] + middle + suffix, "spm" if at[SUFFIX] == 1 else "psm"


@given(length=st.integers(0, 50), closed=st.booleans(), position=st.integers(0, 2**50))
def test_only_the_end_of_the_suffix_gives_way_to_the_ids(length: int, closed: bool, position: int) -> None:
    document = [*range(length), *([END] if closed else [])]
    changed = fim()(np.array(document, dtype=np.uint32), position).tolist()
    assert len(changed) == len(document)
    if length < 4:
        assert changed == document
        return
    if closed:
        assert changed.pop() == END
    # the suffix loses its last three tokens to the control ids: 0 .. length - 4 remain, in order
    assert restored(changed)[0] == list(range(length - 3))


def test_rates() -> None:
    document = np.arange(60, dtype=np.uint32)
    changed = [fim(rate=0.3)(document, position).tolist() for position in range(2000)]
    rearranged = [ids for ids in changed if ids != document.tolist()]
    assert abs(len(rearranged) - 600) < 80  # four standard deviations
    # with an empty prefix both forms are the same sequence
    forms = [restored(ids)[1] for ids in rearranged if ids[1] == SUFFIX or ids[1] == 0]
    assert abs(forms.count("spm") / len(forms) - 0.5) < 0.09
    assert {restored(fim(spm_share=0.0)(document, p).tolist())[1] for p in range(9)} == {"psm"}
    assert {restored(fim(spm_share=1.0)(document, p).tolist())[1] for p in range(9)} == {"spm"}
    assert all((fim(rate=0.0)(document, p) == document).all() for p in range(50))
    cuts = [ids.index(SUFFIX) - 1 for ids in rearranged if restored(ids)[1] == "psm"]
    assert abs(np.mean(cuts) - 57 / 3) < 4, "both cuts are uniform, so the prefix is a third on average"


def test_pure_function_of_seed_source_and_position() -> None:
    document = np.arange(60, dtype=np.uint32)
    one = [fim()(document, position).tolist() for position in range(20)]
    assert one == [fim()(document, position).tolist() for position in range(20)]
    for other in (fim(seed=1), fim(source="text")):
        assert one != [other(document, position).tolist() for position in range(20)]
    assert len({tuple(ids) for ids in one}) > 15

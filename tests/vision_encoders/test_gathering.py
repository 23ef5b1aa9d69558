"""Messages between ranks through shared pages are those through torch.distributed; see pages_on_ranks.py."""

import platform
import sys
from pathlib import Path

import pytest
import torch
from started_ranks import found_on_ranks

from vision_encoders.gathering import gather_over_ranks

SCRIPT = Path(__file__).with_name("pages_on_ranks.py")
HAS_PAGES = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("pages") / "found.json"
    found = found_on_ranks(SCRIPT, 3, out)
    errors = {path.suffix[1:]: path.read_text() for path in out.parent.glob("found.[0-9]")}
    return found, errors


def test_every_rank_hears_what_every_rank_said(on_ranks):
    """3,000 messages of five dtypes and lengths, each rank at its own pace; an empty one; slices; one who comes late."""
    assert len(on_ranks[0]) == 3
    for found in on_ranks[0]:
        assert found["many"] and found["empty"] and found["apart"] and found["late"]


def test_pages_grow_with_the_messages_and_what_was_heard_is_kept(on_ranks):
    """An answer that stayed a view of the pages would change with the next messages."""
    for found in on_ranks[0]:
        assert found["has_pages"] == HAS_PAGES and found["longer"] and found["grew"] == HAS_PAGES and found["kept"]


@pytest.mark.skipif(not HAS_PAGES, reason="shared pages need Linux on x86")
@pytest.mark.parametrize("reason", ["processor", "memory", "look", "another_host"])
def test_where_one_rank_cannot_have_pages_all_go_without(on_ranks, reason):
    """Were they of two minds, each would wait for the other."""
    assert all(found[reason] for found in on_ranks[0])


@pytest.mark.skipif(not HAS_PAGES, reason="shared pages need Linux on x86")
def test_a_new_process_group_has_new_pages_and_a_rank_that_ends_is_named(on_ranks):
    found, errors = on_ranks
    assert all(each["again"] for each in found)
    assert set(errors) == {"0", "1"} and all("rank 2 has ended" in text for text in errors.values())


def test_alone_one_hears_oneself(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    own = torch.ones(3, requires_grad=True)
    heard = gather_over_ranks(own)
    assert heard.tolist() == [[1.0, 1.0, 1.0]] and not heard.requires_grad
    assert heard.data_ptr() != own.data_ptr()

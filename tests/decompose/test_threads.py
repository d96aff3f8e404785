from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from threads import with_threads

from qosora.decompose.threads import panels, parallel_map, reproducible


def look() -> tuple[str, int, bool, str]:
    """What a thread computes with."""
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return threading.current_thread().name, torch.get_num_threads(), torch.is_grad_enabled(), precision


def default_threads() -> int:
    """What a new thread begins with."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture(params=["ieee", "bf16"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    torch.backends.mkldnn.matmul.fp32_precision = request.param  # type: ignore[attr-defined]
    yield request.param
    torch.backends.mkldnn.matmul.fp32_precision = before  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_operation_has_one_thread(count: int, precision: str):
    together = threading.Barrier(count)

    def follow(_: int) -> tuple[str, int, bool, str]:
        together.wait(timeout=60)  # as many at a time as torch may use
        return look()

    lead = reproducible(lambda x: (look(), parallel_map(follow, range(2 * count))))
    leader, followers = with_threads(count, lambda: lead(torch.ones(1)))
    for _, threads, grad, products in (leader, *followers):
        assert (threads, grad, products) == (1, False, "ieee")
    names = {name for name, *_ in followers}
    assert len(names) == count
    assert threading.current_thread().name not in names | {leader[0]}


@pytest.mark.parametrize("error", [None, ValueError("no")])
def test_the_caller_is_left_as_it_was(error: Exception | None, precision: str):
    @reproducible
    def work(x: torch.Tensor) -> list[int]:
        def step(i: int) -> int:
            if error and i == 3:
                raise error
            return i

        return parallel_map(step, range(5))

    def call() -> tuple[int, int]:
        if error:
            with pytest.raises(ValueError, match=r"^no$"):
                work(torch.ones(1))
        else:
            assert work(torch.ones(1)) == list(range(5))
        return torch.get_num_threads(), default_threads()

    running = threading.active_count()
    assert with_threads(3, call) == (3, 3)
    assert torch.backends.mkldnn.matmul.fp32_precision == precision  # type: ignore[attr-defined]
    assert threading.active_count() == running
    assert torch.is_grad_enabled()


def test_a_thread_with_its_own_number_changes_no_other():
    def elsewhere() -> None:
        torch.get_num_threads()  # else it takes the default at its first operation
        torch.set_num_threads(1)
        restore = threading.Thread(target=torch.set_num_threads, args=(2,))
        restore.start()
        restore.join()
        assert (torch.get_num_threads(), default_threads()) == (1, 2)
        work(torch.ones(1))
        found.append((torch.get_num_threads(), default_threads()))

    work = reproducible(lambda x: parallel_map(abs, range(4)))
    found: list[tuple[int, int]] = []
    thread = threading.Thread(target=elsewhere)
    before = torch.get_num_threads()
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    assert found == [(1, 2)]


def test_calls_inside_of_calls_share_the_threads():
    inner = reproducible(lambda x: (threading.current_thread().name, parallel_map(lambda i: i + 1, range(4))))

    @reproducible
    def outer(x: torch.Tensor) -> bool:
        return inner(x) == (threading.current_thread().name, [1, 2, 3, 4])

    assert with_threads(2, lambda: outer(torch.ones(1)))


def test_outside_it_is_map():
    assert parallel_map(str, range(3)) == ["0", "1", "2"]


def test_arguments_by_name():
    @reproducible
    def double(x: torch.Tensor, *, times: int) -> torch.Tensor:
        return x * times

    assert double(x=torch.ones(2), times=3).tolist() == [3, 3]


def test_panels():
    cpu = torch.device("cpu")
    assert panels(7, 3, cpu) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert panels(6, 3, cpu) == [slice(0, 3), slice(3, 6)]
    assert panels(2, 3, cpu) == [slice(0, 2)]
    assert panels(0, 3, cpu) == []
    assert panels(7, 3, torch.device("cuda")) == [slice(0, 7)]

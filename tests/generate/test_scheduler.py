"""Pages belong to exactly the jobs that use them, whatever happens in which order."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lm.generate.pages import Pool, digests
from lm.generate.scheduler import Job, Scheduler

SIZE, WINDOW, SINKS = 4, 6, 2
REACHES = (None, (WINDOW, SINKS))


def check(scheduler: Scheduler) -> None:
    """Every page has as many users as jobs that hold it, and a page is free or used."""
    for reach, pool in scheduler.pools.items():
        held = [0] * pool.count
        for job in scheduler.running:
            for page in job.pages[reach]:
                if page is not None:
                    held[page] += 1
        assert held == pool.users
        assert pool.used == sum(users > 0 for users in held)
    for job in scheduler.waiting:
        assert not job.pages and not job.computed


def seen(job: Job, reach) -> list[int]:
    """The pages that the next token of a job reads."""
    count = -(-job.computed // SIZE)
    if reach is None:
        return list(range(count))
    first = max(0, job.computed - WINDOW + 1)
    return [i for i in range(count) if (i + 1) * SIZE > first or i * SIZE < SINKS]


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=20), min_size=1, max_size=12),
    outputs=st.lists(st.integers(1, 8), min_size=12, max_size=12),
    pages=st.integers(7, 12),
    room=st.integers(1, 9),
    chunk=st.integers(1, 9),
    cancels=st.lists(st.integers(0, 60), max_size=5),
)
def test_all_jobs_end_and_all_pages_come_back(prompts, outputs, pages, room, chunk, cancels):
    """Two letters only, so that many jobs begin alike."""
    pools = {reach: Pool(pages) for reach in REACHES}
    scheduler = Scheduler(pools, size=SIZE, most=4, chunk=chunk)
    jobs = [Job(None, list(prompt), len(prompt)) for prompt in prompts]
    content: dict = {}  # (reach, page, slot) -> all tokens up to the one stored there
    for job in jobs:
        scheduler.add(job)
    finished = 0
    for step in range(4_000):
        if step in cancels:
            scheduler.remove(jobs[step % len(jobs)])
        planned = scheduler.plan(room)
        assert sum(planned.values()) <= room and len(scheduler.running) <= 4
        check(scheduler)
        for job, count in planned.items():
            assert 1 <= count <= chunk
            for place in range(job.computed, job.computed + count):
                for reach in REACHES:
                    page = job.pages[reach][place // SIZE]
                    content[reach, page, place % SIZE] = tuple(job.tokens[: place + 1])
            # What the last of these tokens sees is there.
            last = job.computed + count - 1
            for reach in REACHES:
                low = 0 if reach is None else max(0, last - WINDOW + 1)
                for place in (*range(low, last + 1), *range(min(SINKS, last + 1))):
                    page = job.pages[reach][place // SIZE]
                    assert content[reach, page, place % SIZE] == tuple(job.tokens[: place + 1])
        for job, count in planned.items():
            scheduler.computed(job, count)
            for reach in REACHES:
                assert all(job.pages[reach][i] is not None for i in seen(job, reach))
            if job.computed == len(job.tokens):
                if len(job.tokens) - job.prompt >= outputs[jobs.index(job)]:
                    scheduler.remove(job)
                    finished += 1
                else:
                    job.tokens.append(step % 2)
        check(scheduler)
        if not scheduler.running and not scheduler.waiting:
            break
    else:
        raise AssertionError("jobs did not end")
    assert finished >= len(jobs) - len(cancels)
    assert all(pool.used == 0 and pool.available == pages for pool in pools.values())


def test_pages_are_found_by_all_tokens_before_them():
    first, second = digests([1, 2, 3, 4, 5], 2, []), digests([9, 2, 3, 4], 2, [])
    assert len(first) == 2 and first[1] != second[1]
    assert digests([1, 2, 3, 4, 5, 6], 2, first)[:2] == first


def test_the_pages_used_last_stay_longest():
    pool = Pool(2)
    for digest in (b"a", b"b"):
        page = pool.take()
        pool.keep(page, digest)
        pool.drop(page)
    pool.share(pool.find(b"a"))
    assert pool.take() is not None
    assert pool.find(b"b") is None and pool.find(b"a") is not None

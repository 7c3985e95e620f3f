"""Makes images of any mixture of buckets, in the order of their requests."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from jaxdiff.engine.image import Image
from jaxdiff.request import Bucket, Request


def in_order(
    requests: Iterable[Request],
    of_bucket: Callable[[Iterator[Request]], Iterator[Image]],
    look_ahead: int,
    finished: Callable[[int], object] = lambda done: None,
) -> Iterator[Image]:
    """Yields the image of each request, in order, and holds at most `look_ahead` of them.

    The buckets take turns: that of the oldest unfinished image is next, and its turn lasts as long
    as requests for it are found.

    Args:
      requests: prepared; consumed as needed.
      of_bucket: makes the images of one bucket, in order.
      look_ahead: how many requests may be read from the oldest unfinished one on.
      finished: called with the number of images made so far, whenever one is made.
    """
    source = enumerate(requests)
    waiting: dict[Bucket, deque[tuple[int, Request]]] = {}
    running: deque[int] = deque()
    early: dict[int, Image] = {}  # images made before their turn
    read = made = following = 0  # the last is the number of the next image to yield

    def read_one() -> bool:
        nonlocal read
        if read - following >= look_ahead:
            return False
        for number, request in source:
            waiting.setdefault(request.bucket, deque()).append((number, request))
            read = number + 1
            return True
        return False

    def turn(bucket: Bucket) -> Iterator[Request]:
        while waiting[bucket] or read_one():
            if waiting[bucket]:
                number, request = waiting[bucket].popleft()
                running.append(number)
                yield request

    while waiting or read_one():
        bucket = min(waiting, key=lambda each: waiting[each][0][0])
        for image in of_bucket(turn(bucket)):
            early[running.popleft()] = image
            made += 1
            finished(made)
            while following in early:
                yield early.pop(following)
                following += 1
        del waiting[bucket]

"""What the watching threads leave behind at the end of a script."""

import threading

from fxpipe.runtime.ranks import watch


def test_a_thread_that_asks_the_store_for_too_long_is_waited_for_at_the_end(monkeypatch):
    monkeypatch.setattr(watch, "STORE_S", 0.01)
    monkeypatch.setattr(watch, "_late", [])
    answered = threading.Event()
    assert watch._bounded(lambda: answered.wait(60)) is None
    (asking,) = watch._late
    answered.set()
    watch._join_late()
    assert not asking.is_alive()

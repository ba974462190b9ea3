"""`tinychat` and `python -m tinychat`: Ctrl+C ends the program quietly, from first import to last step."""

import sys

PATIENCE = 5  # seconds that threads have to end after Ctrl+C


def main() -> None:
    """The command line."""
    sys.unraisablehook = _unraisable
    try:
        from tinychat.base.children import trusted_path

        sys.path[:] = trusted_path()
        from tinychat.cli.main import main as run

        run()
    except KeyboardInterrupt:
        _end_soon()
        raise SystemExit(130) from None
    finally:
        # What there was to say is said; Python's own shutdown takes a tenth of a second and would complain. A
        # thread that does not end can still be interrupted; once all have, Ctrl+C changes nothing.
        import atexit
        import os
        import signal

        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as in a script's background job
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
            _listen()


def _end_soon() -> None:
    """Python waits for its threads, and one that reads from a dead network may take minutes."""
    import os
    import threading

    timer = threading.Timer(PATIENCE, os._exit, (130,))
    timer.daemon = True
    timer.start()


def _listen() -> None:
    """Python handles Ctrl+C in its main thread, which misses it if it begins to wait for another thread at
    that very moment: where there are others, one hears it too.
    """
    import os
    import signal
    import threading

    if all(t.daemon or t is threading.current_thread() for t in threading.enumerate()):
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)  # gets the number of each signal

    def wait() -> None:
        while os.read(heard, 1) != bytes([signal.SIGINT]):
            pass
        os._exit(130)

    threading.Thread(target=wait, daemon=True).start()


def _unraisable(lost) -> None:
    """Ctrl+C that came in a `__del__` or a weakref's callback, where Python forgets it, comes once more."""
    if lost.exc_type is KeyboardInterrupt:
        import signal
        import threading

        again = (threading.main_thread().ident, signal.SIGINT)
        threading.Timer(0.01, signal.pthread_kill, again).start()
    else:
        sys.__unraisablehook__(lost)


if __name__ == "__main__":
    main()

"""`tinychat` and `python -m tinychat`: Ctrl+C ends the program quietly while it is still importing itself."""


def main() -> None:
    """The command line."""
    try:
        from tinychat.cli.main import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()

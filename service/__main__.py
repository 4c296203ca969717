"""``python -m betrace.service``: the command line."""

from betrace.service.cli.main import main

if __name__ == "__main__":
    main()

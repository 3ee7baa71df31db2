"""`python -m fractal_runner`: the same as the `fractal-runner` command."""

from fractal_runner.cli import main

if __name__ == "__main__":
    main()

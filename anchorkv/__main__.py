"""`python -m anchorkv`: the command line, as `accelerate launch -m anchorkv train` needs it."""

from anchorkv.cli import main

main()

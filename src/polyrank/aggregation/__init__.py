"""Rules that turn clients' updates into the next global adapter. Pure: state in, state out."""

"""Times our plans and other engines in turns, in one run, and checks that they write the same."""

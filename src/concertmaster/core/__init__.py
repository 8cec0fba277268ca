"""Facts and rules of scheduling: events in, actions out, standard library only."""

"""Client processes of a site that are forked from one that has imported everything."""

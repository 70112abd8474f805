"""Methods that choose inner neurons of the feed-forward: one file each, named as it is chosen."""

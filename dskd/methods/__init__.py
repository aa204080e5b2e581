"""The methods: one file each, found through ``dskd.method.METHODS``."""

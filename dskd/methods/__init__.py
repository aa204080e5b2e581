"""The methods: one file each, found through ``dskd.methods.base.METHODS``."""

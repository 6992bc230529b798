"""The one doorway to the kernel: netlink, namespaces, nftables, sysctls, TUN and sockets."""

"""Machines that ssh reaches: an sshd on each node, and what a user has in ~/.ssh."""

from __future__ import annotations

import os
from pathlib import Path

from nodes import Nodes, sh

PORT = 2222


class SshNodes:
    """Starts sshd on nodes that are up. Root's ~/.ssh is a folder of each node's own."""

    def __init__(self, nodes: Nodes, root: Path):
        self.nodes, self.root = nodes, root

    def up(self) -> SshNodes:
        self.root.mkdir(parents=True, exist_ok=True)
        sh(f"ssh-keygen -q -t ed25519 -N '' -f {self.root}/id && ssh-keygen -q -t ed25519 -N '' -f {self.root}/hostkey")
        (self.root / "sshd_config").write_text(
            f"Port {PORT}\nHostKey {self.root}/hostkey\nAuthorizedKeysFile {self.root}/id.pub\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nPidFile none\nMaxStartups 100\n"
        )
        # Nothing here but what a user needs: whatever else bigtrain wants of ssh it must ask for itself.
        (self.root / "config").write_text(
            f"Host *\n  Port {PORT}\n  User root\n  IdentityFile {self.root}/id\n"
            "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        )
        for name in self.nodes.names:
            self.serve(name)
        return self

    def serve(self, name: str) -> None:
        """Begin to listen on a node that has booted."""
        self.nodes.run(
            name,
            f"mkdir -p /run/sshd /root/.ssh && mount -t tmpfs tmpfs /root/.ssh && install -m600 {self.root}/config /root/.ssh/config"
            f" && env -i PATH={os.environ['PATH']} /usr/sbin/sshd -f {self.root}/sshd_config -E {self.root}/{name}.log",
        )

    def boot(self, name: str) -> None:
        """Bring a node back that was switched off."""
        self.nodes.boot(name)
        self.nodes.cable(name, True)
        self.serve(name)

"""What the lines of /proc/self/mountinfo say of a filesystem's locks, family by family."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from safefs.family import REFUSED, Mounted, Reach, mounted_at, parse

NFS = "vers=4.2,rsize=1048576,wsize=1048576,namlen=255,hard,proto=tcp,timeo=600,retrans=2,sec=sys,clientaddr=10.0.0.2"
NFS3 = "vers=3,rsize=524288,wsize=524288,namlen=255,hard,proto=tcp,timeo=600,retrans=2,sec=sys,mountaddr=10.0.0.1"
FUSE = "rw,user_id=0,group_id=0,allow_other,max_read=131072"

LINES = {
    "ext4": "29 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard,errors=remount-ro",
    "xfs": "61 29 259:3 / /data rw,noatime shared:31 - xfs /dev/nvme0n1p3 rw,attr2,inode64,logbufs=8,noquota",
    "btrfs": "44 1 0:33 /@home /home rw,relatime shared:6 - btrfs /dev/sda2 rw,ssd,subvolid=257,subvol=/@home",
    "tmpfs": "36 25 0:31 / /dev/shm rw,nosuid,nodev shared:14 - tmpfs tmpfs rw,inode64",
    "overlay": "700 650 0:52 / / rw,relatime - overlay overlay rw,lowerdir=/l/A:/l/B,upperdir=/u,workdir=/w",
    "nfs4": f"88 29 0:58 / /mnt/n rw,relatime shared:41 - nfs4 srv:/e rw,{NFS},local_lock=none,addr=10.0.0.1",
    "nfs3": f"89 29 0:59 / /mnt/n rw,relatime - nfs srv:/e rw,{NFS3},mountport=20048,local_lock=none,addr=10.0.0.1",
    "nfs3 nolock": f"89 29 0:59 / /mnt/n rw - nfs srv:/e rw,{NFS3},nolock,mountproto=tcp,local_lock=all,addr=10.0.0.1",
    "nfs3 posix": f"89 29 0:59 / /mnt/n rw - nfs srv:/e rw,{NFS3},local_lock=posix,addr=10.0.0.1",
    "nfs3 flock": f"89 29 0:59 / /mnt/n rw - nfs srv:/e rw,{NFS3},local_lock=flock,addr=10.0.0.1",
    "lustre flock": "95 29 0:61 / /scratch rw,relatime - lustre 10.0.0.1@tcp:/scratch rw,checksum,flock,lazystatfs",
    "lustre localflock": "95 29 0:61 / /scratch rw - lustre 10.0.0.1@tcp:/scratch rw,localflock,lazystatfs",
    "lustre noflock": "95 29 0:61 / /scratch rw - lustre 10.0.0.1@tcp:/scratch rw,noflock,lazystatfs",
    "lustre": "95 29 0:61 / /scratch rw,relatime - lustre 10.0.0.1@tcp:/scratch rw,checksum,lazystatfs",
    "gpfs": "97 29 0:62 / /gpfs/fs1 rw,relatime shared:50 - gpfs fs1 rw,relatime",
    "beegfs": "98 29 0:63 / /mnt/beegfs rw,relatime - beegfs beegfs_nodev rw,cfgFile=/etc/beegfs/beegfs-client.conf",
    "ceph": "99 29 0:64 / /mnt/ceph rw,relatime - ceph 10.0.0.1:6789:/ rw,name=admin,secret=<hidden>,acl",
    "ceph-fuse": f"100 29 0:65 / /mnt/c rw,nosuid,nodev - fuse.ceph-fuse ceph-fuse {FUSE}",
    "glusterfs": f"101 29 0:66 / /mnt/g rw,relatime - fuse.glusterfs srv:/volume {FUSE}",
    "juicefs": f"102 29 0:67 / /mnt/j rw,relatime - fuse.juicefs JuiceFS:v {FUSE}",
    "moosefs": f"103 29 0:68 / /mnt/m rw,relatime - fuse.mfs mfsmaster:9421 {FUSE}",
    "sshfs": f"104 29 0:69 / /mnt/s rw,nosuid,nodev - fuse.sshfs user@host:/d {FUSE}",
    "bindfs": f"42 30 0:39 / /mnt/b rw,nosuid,nodev - fuse /srv/with\\040space {FUSE}",
    "gfs2": "105 29 253:2 / /mnt/gfs rw,noatime - gfs2 /dev/vg/lv rw",
    "gfs2 local": "105 29 253:2 / /mnt/gfs rw,noatime - gfs2 /dev/vg/lv rw,localflocks",
    "cifs": "106 29 0:70 / /mnt/smb rw,relatime - cifs //srv/share rw,vers=3.1.1,cache=strict,username=u,soft",
    "cifs nobrl": "106 29 0:70 / /mnt/smb rw,relatime - cifs //srv/share rw,vers=3.1.1,nobrl,username=u",
    "virtiofs": "107 29 0:71 / /mnt/v rw,relatime - virtiofs share rw",
    "9p": "108 29 0:72 / /mnt/9 rw,relatime - 9p share rw,access=client,trans=virtio",
    "afs": "109 29 0:73 / /afs rw,relatime - afs #root.afs(1) rw",
    "unheard of": "110 29 0:74 / /mnt/x rw,relatime - newfs server:/x rw",
}

REACHES = {
    Reach.NODE: ("ext4", "xfs", "btrfs", "tmpfs", "overlay"),
    Reach.CLUSTER: (
        *("nfs4", "nfs3", "nfs3 flock", "lustre flock", "gpfs", "ceph", "ceph-fuse", "glusterfs", "juicefs", "gfs2"),
        "cifs",
    ),
    Reach.CLIENT: ("nfs3 nolock", "nfs3 posix", "lustre localflock", "sshfs", "gfs2 local", "cifs nobrl", "afs"),
    Reach.NOBODY: ("lustre noflock",),
    Reach.UNKNOWN: ("lustre", "beegfs", "moosefs", "bindfs", "virtiofs", "9p", "unheard of"),
}


def described(name: str) -> Mounted:
    """The mount of a line, found by its id among all others."""
    others = [line for line in LINES.values() if line.split()[0] != LINES[name].split()[0]]
    return parse([*others, LINES[name] + "\n"], int(LINES[name].split()[0]))


@pytest.mark.parametrize(("name", "reach"), [(name, reach) for reach, names in REACHES.items() for name in names])
def test_reach(name: str, reach: Reach) -> None:
    mounted = described(name)
    found, why = mounted.reach()
    assert found is reach
    assert mounted.kind in why


def test_every_line_is_judged() -> None:
    assert sorted(name for names in REACHES.values() for name in names) == sorted(LINES)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("nfs3 nolock", "mounted with nolock"),
        ("nfs3 posix", "mounted with local_lock=posix"),
        ("lustre localflock", "mounted with localflock"),
        ("beegfs", "tuneUseGlobalFileLocks"),
        ("unheard of", "newfs is not known"),
    ],
)
def test_the_reason_names_the_option(name: str, word: str) -> None:
    assert word in described(name).reach()[1]


def test_a_line() -> None:
    mounted = described("bindfs")
    assert (mounted.kind, mounted.source, mounted.device) == ("fuse", "/srv/with space", "0:39")
    assert mounted.option("max_read") == "131072" and mounted.option("nosuid") == "" and mounted.option("no") is None


def test_moosefs_as_its_own_client_mounts_it() -> None:
    line = f"48 27 0:45 / /mnt/m rw,relatime - fuse mfs\\04310.0.0.1:9421 {FUSE}"
    assert parse([line], 48).kind == "fuse.mfs"
    assert parse([line.replace("mfs", "xfs")], 48).kind == "fuse"


# As clients of object stores were seen to mount: with their type, or as `fuse` with themselves for a source.
OBJECT_STORES = [
    ("fuse", "mountpoint-s3"),
    ("fuse", "blobfuse"),
    ("fuse", "blobfuse2"),
    ("fuse", "gcsfuse"),
    ("fuse.gcsfuse", "gcsfuse"),
    ("fuse.gcsfuse", "bucket-1"),
    ("fuse.goofys", "bucket"),
    ("fuse.geesefs", "bucket:"),
    ("fuse.s3fs", "s3fs"),
    ("fuse.ossfs", "ossfs"),
    ("fuse.ossfs2", "ossfs2"),
    ("fuse.cosfs", "cosfs"),
    ("fuse.rclone", "remote:bucket"),
]


def seen(kind: str, source: str) -> Mounted:
    return parse([f"48 27 0:45 / /mnt/m rw,nosuid,nodev,noatime - {kind} {source} {FUSE}"], 48)


@pytest.mark.parametrize(("kind", "source"), OBJECT_STORES)
def test_object_stores_are_known_as_they_are_mounted(kind: str, source: str) -> None:
    assert seen(kind, source).kind in REFUSED


@pytest.mark.parametrize("source", ["bucket", "bucket:prefix", "mountpoint-s3x", "/dev/fuse"])
def test_fuse_that_does_not_say_which(source: str) -> None:
    """As goofys and gcsfuse before 2022, whose source is the bucket."""
    mounted = seen("fuse", source)
    assert mounted.kind == "fuse" and mounted.is_nameless


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("fuse", "/srv/directory"),  # bindfs before 1.18.2
        ("fuse", "mfs\\04310.0.0.1:9421"),
        ("fuse.sshfs", "user@host:/d"),
        ("fuse.glusterfs", "srv:/volume"),
        ("fuse.juicefs", "JuiceFS:v"),
        ("fuse.fuse-overlayfs", "fuse-overlayfs"),
        ("fuse.mergerfs", "a:b"),
        ("fuseblk", "/dev/sda1"),
        ("newfs", "bucket"),
    ],
)
def test_what_is_neither(kind: str, source: str) -> None:
    mounted = seen(kind, source)
    assert mounted.kind not in REFUSED and not mounted.is_nameless


@pytest.mark.parametrize("name", ["ext4", "nfs4", "lustre", "glusterfs", "juicefs", "moosefs", "ceph", "cifs"])
def test_filesystems_whose_clients_agree_on_inode_numbers(name: str) -> None:
    assert described(name).shares_numbers


@pytest.mark.parametrize("name", ["sshfs", "bindfs", "unheard of"])
def test_filesystems_whose_clients_may_not(name: str) -> None:
    assert not described(name).shares_numbers


def test_numbers_of_cifs_are_an_option() -> None:
    line = LINES["cifs"].replace("vers=", "noserverino,vers=")
    assert not parse([line], 106).shares_numbers


@pytest.mark.parametrize(("name", "keep"), [("nfs4", True), ("sshfs", True), ("unheard of", True), ("ext4", False)])
def test_listings_that_clients_keep(name: str, keep: bool) -> None:
    assert described(name).caches_listings is keep
    assert not described("glusterfs").caches_listings


def test_what_is_not_in_the_list_is_unknown() -> None:
    assert parse(LINES.values(), 4711).reach()[0] is Reach.UNKNOWN
    assert parse(["", "nonsense", "29 1"], 29) == Mounted()


def test_a_real_directory(tmp_path: Path) -> None:
    command = ["findmnt", "-n", "-o", "FSTYPE,MAJ:MIN", "-T", tmp_path]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    mounted = mounted_at(tmp_path)
    assert [mounted.kind, mounted.device] == done.stdout.split()[-2:]  # the topmost, where one lies on another
    assert mounted_at(Path("/proc")).kind == "proc"
    with pytest.raises(FileNotFoundError):
        mounted_at(Path(os.fspath(tmp_path), "missing"))

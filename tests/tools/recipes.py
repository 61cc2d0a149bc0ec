"""What users do with everyday tools, as shell scripts that run in any directory.

Each runs with `bash -eu` in an empty working directory.  `$SRC` is a tree with modes, symlinks, hard links and old
time stamps on a plain filesystem, `$REPO` a git repository, `$URL` a web server and package index, `$PY` a Python with
uv, numpy and safetensors beside it, `$TOOLS` the directory of its commands.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.tools.trees import ANY_TIME, Rules


@dataclass(frozen=True)
class Recipe:
    """A script, and what may differ between two runs of it."""

    script: str
    rules: Rules = ANY_TIME


RECIPES: dict[str, Recipe] = {
    "git": Recipe(
        r"""
        git clone -q "file://$REPO" work
        cd work
        for n in 1 2 3 4 5; do echo "line $n" >> "dir/file$n.txt"; git commit -qam "change $n"; done
        git mv dir/file1.txt dir/renamed.txt
        git rm -q dir/file2.txt
        chmod +x dir/file3.txt
        git add -A; git commit -qm "rename, remove, mode"
        git checkout -q -b side HEAD~3
        echo side > side.txt; git add side.txt; git commit -qm side
        git checkout -q main
        git merge -q --no-edit side
        echo dirty >> dir/file4.txt; git stash -q; git stash pop -q; git checkout -q dir/file4.txt
        git tag -a -m one v1
        git gc -q --prune=now
        git fsck --full --strict
        test -z "$(git status --porcelain)"
        cd ..
        # Within one filesystem this makes hard links of the packs.
        git clone -q work second
        git -C second fsck --full --strict
        git -C second repack -adq
        test "$(git -C second rev-parse HEAD)" = "$(git -C work rev-parse HEAD)"
        git clone -q --bare work bare.git
        git -C second push -q ../bare.git HEAD:refs/heads/pushed
        """,
        # The index holds inode numbers and times, and a local clone writes down where it came from.
        Rules(volatile=("*/.git/index", "second/.git/config", "second/.git/logs/*", "bare.git/config")),
    ),
    "pip": Recipe(
        r"""
        mkdir tmp; export TMPDIR=$PWD/tmp
        pip() { "$PY" -m pip --isolated --cache-dir "$PWD/cache" --disable-pip-version-check "$@"; }
        install() { pip install -q --index-url "$URL/simple" --no-build-isolation --target "$@"; }
        install one acme-wheel acme-sdist
        # The second time out of the cache, where the wheel that was built lies.
        install two acme-wheel acme-sdist
        PYTHONPATH=one "$PY" -B -c 'import acme_wheel, acme_sdist; assert acme_wheel.N + acme_sdist.N == 3'
        install one --upgrade acme-wheel
        rmdir tmp
        """,
        # Byte code holds the time of its source; cache entries hold the time of the answer.
        Rules(ignored=("cache/*/origin.json", "cache/selfcheck*"), volatile=("*.pyc", "cache/*")),
    ),
    "uv": Recipe(
        r"""
        export UV_CACHE_DIR=$PWD/cache UV_NO_CONFIG=1 UV_PYTHON_DOWNLOADS=never UV_INDEX_URL=$URL/simple
        "$TOOLS/uv" pip install -q --python "$PY" --target one acme-wheel
        "$TOOLS/uv" pip install -q --python "$PY" --target two acme-wheel
        "$TOOLS/uv" venv -q --python "$PY" env
        "$TOOLS/uv" pip install -q --python env/bin/python acme-wheel
        env/bin/python -B -c 'import acme_wheel; assert acme_wheel.N == 1'
        "$TOOLS/uv" pip uninstall -q --python env/bin/python acme-wheel
        "$TOOLS/uv" cache prune -q
        """,
        # The cache draws names; the environment holds its own path.
        Rules(ignored=("cache/*",), volatile=("env/bin/activate*", "*/.lock", "*.pyc", "*/uv_cache.json")),
    ),
    "rsync": Recipe(
        r"""
        cp -a "$SRC" source
        rsync -aH source/ default/
        rsync -aH --inplace source/ inplace/
        # Newer files, other lengths, and some that are gone.
        for f in source/sub/f1*; do echo changed >> "$f"; touch -d '2024-05-05 05:05:05 UTC' "$f"; done
        rm source/sub/f3.txt
        truncate -s 300000 source/big.bin; touch -d '2024-06-06 06:06:06 UTC' source/big.bin
        rsync -aH --delete source/ default/
        rsync -aH --delete --inplace --no-whole-file source/ inplace/
        rsync -aH --delete --delay-updates --partial-dir=.part "$SRC/" third/
        diff <(rsync -aHnic --delete source/ default/) /dev/null
        diff <(rsync -aHnic --delete source/ inplace/) /dev/null
        """,
        Rules(mtimes=True),
    ),
    "tar": Recipe(
        r"""
        tar -C "$SRC" -cf in.tar --sort=name .
        tar -C "$SRC" -cf - --sort=name . | gzip -n > in.tar.gz
        mkdir out out2
        tar -C out -xpf in.tar
        tar -C out -df in.tar
        tar -C out2 -xzpf in.tar.gz
        tar -C out2 -xpf in.tar --overwrite
        tar -C out -rf in.tar big.bin
        tar -tf in.tar > list
        touch -d '2024-01-01 UTC' in.tar in.tar.gz list
        """,
        Rules(mtimes=True),
    ),
    "cp": Recipe(
        r"""
        cp -a "$SRC" one
        cp -a one two
        cp -al one linked
        cp -a --remove-destination two/big.bin linked/big.bin
        cp --preserve=all --sparse=always one/big.bin sparse.bin
        cp --preserve=all -u one/sub/f1.txt two/sub/f2.txt
        cp -a --backup=numbered one/sub/f2.txt two/sub/f1.txt
        cmp one/big.bin two/big.bin
        """,
        Rules(mtimes=True),
    ),
    "unzip": Recipe(
        r"""
        export TZ=UTC
        unzip -q "$SRC/../archive.zip" -d out
        cp -a "$SRC/sub" sub
        zip -qrX made.zip sub
        zip -qX made.zip out/a.txt
        unzip -tq made.zip > /dev/null
        unzip -qo made.zip -d again
        touch -d '2024-01-01 UTC' made.zip
        """,
        Rules(mtimes=True),
    ),
    "make": Recipe(
        r"""
        for n in $(seq 1 12); do
            printf 'int f%d(int x) { return x + %d; }\n' "$n" "$n" > "f$n.c"
        done
        { for n in $(seq 1 12); do printf 'int f%d(int);\n' "$n"; done
          printf '#include <stdio.h>\nint main(void) { int x = 0;\n'
          for n in $(seq 1 12); do printf 'x = f%d(x);\n' "$n"; done
          printf 'printf("%%d\\n", x); return 0; }\n'; } > main.c
        printf 'SRCS := $(wildcard f*.c)\nprog: main.o libf.a\n\tgcc -o $@ $^\n' > Makefile
        printf 'libf.a: $(SRCS:.c=.o)\n\trm -f $@\n\tar rcs $@ $(sort $^)\n' >> Makefile
        printf '%%.o: %%.c\n\tgcc -O1 -MMD -c -o $@ $<\n-include $(wildcard *.d)\n' >> Makefile
        make -s -j2
        test "$(./prog)" = 78
        make -q
        sed -i 's/+ 5/+ 50/' f5.c
        make -s -j2
        test "$(./prog)" = 123
        make -q
        strip prog
        test "$(./prog)" = 123
        """,
    ),
    "sed": Recipe(
        r"""
        cp -a "$SRC/sub" sub
        sed -i 's/line/LINE/' sub/*.txt
        sed -i.bak -e '1d' sub/f1.txt
        sed --in-place=.orig -e '$a end' sub/f2.txt
        ln -s sub/f3.txt link
        sed -i --follow-symlinks 's/LINE/Line/' link
        """,
    ),
    # Not here: writing through one name of a hard link.  A publish makes a new inode, so that name leaves the link.
    "vim": Recipe(
        r"""
        cp -a "$SRC/sub" sub
        edit() { vim.tiny -es -N -u NONE -i NONE "$@" < /dev/null; }
        edit -c '%s/line/VIM/' -c 'wq' sub/f1.txt
        edit -c 'set backup' -c '1d' -c 'wq' sub/f2.txt
        edit -c 'set backupcopy=yes' -c '$d' -c 'wq' sub/f3.txt
        edit -c 'set nowritebackup' -c '1d' -c 'wq' sub/f4.txt
        edit -c 'normal ihello' -c 'wq' new.txt
        edit -c '%s/VIM/x/' -c 'w copy.txt' -c 'q!' sub/f1.txt
        """,
    ),
    "truncate and dd": Recipe(
        r"""
        cp "$SRC/big.bin" a; cp "$SRC/big.bin" b
        truncate -s 1000 a; truncate -s +5000 a; truncate -s 12M c; truncate -s 0 d
        dd if=/dev/zero of=b bs=1000 seek=3 count=5 conv=notrunc status=none
        dd if="$SRC/big.bin" of=b bs=4096 seek=300 conv=notrunc,fsync status=none
        dd if="$SRC/big.bin" of=e bs=64k oflag=append conv=notrunc status=none
        dd if="$SRC/big.bin" of=e bs=64k oflag=append conv=notrunc status=none
        dd if=b of=f bs=1M count=1 skip=0 conv=sparse status=none
        fallocate -l 100000 g; fallocate -o 50000 -l 100000 g; fallocate -n -l 900000 g
        fallocate -p -o 8192 -l 16384 b
        """,
    ),
    "shell": Recipe(
        r"""
        for n in $(seq 1 200); do echo "$n" >> appended; done
        (echo one; (echo two; /bin/echo three); printf 'four\n') > group
        { echo one; sh -c 'echo two'; } > braces 2> errors
        exec 3> kept; echo first >&3; sh -c 'echo second >&3'; exec 3>&-
        seq 1 50 | tee copy | sort -r > sorted
        sort -n -o sorted sorted
        exec 4<> both; printf 'abcdef' >&4; exec 4>&-
        : > empty; touch -d '2024-01-01 UTC' touched
        install -m 640 sorted installed; mv installed moved; ln moved hard; ln -s moved soft
        mkfifo pipe; (cat pipe > out & seq 1 10 > pipe; wait)
        split -n 4 "$SRC/big.bin" part.
        cat part.* | cmp - "$SRC/big.bin"
        rm part.ab; mkdir -p a/b/c; mv a/b moved-directory; rmdir a
        set -o noclobber
        if echo no > sorted; then exit 1; fi
        test "$(cat kept)" = $'first\nsecond'
        """,
    ),
    "sqlite, one writer": Recipe(
        r"""
        for mode in delete truncate persist wal; do
            for name in data.db data.sqlite3; do
                f=$mode-$name
                sqlite3 "$f" "PRAGMA journal_mode=$mode; CREATE TABLE t(n INTEGER PRIMARY KEY, s TEXT);" > /dev/null
                for n in 1 2 3 4 5; do
                    sqlite3 "$f" "INSERT INTO t(s) SELECT hex(zeroblob(200)) FROM generate_series(1, 100);"
                done
                sqlite3 "$f" "BEGIN; DELETE FROM t; ROLLBACK; DELETE FROM t WHERE n % 3 = 0; VACUUM;"
                test "$(sqlite3 "$f" 'PRAGMA integrity_check;')" = ok
                test "$(sqlite3 "$f" 'SELECT count(*) FROM t;')" = 334
                sqlite3 "$f" .dump > "$f.sql"
            done
        done
        """,
        # The header counts the changes, and a persistent journal keeps a random number.
        Rules(volatile=("*-journal", "*-wal", "*-shm")),
    ),
    "arrays": Recipe(
        r"""
        "$PY" -B - <<'PYTHON'
        import numpy, safetensors, safetensors.numpy
        tensors = {f"layer{n}": numpy.arange(n * 1000, n * 1000 + 50_000, dtype=numpy.float32) for n in range(8)}
        safetensors.numpy.save_file(tensors, "model.safetensors", metadata={"format": "np"})
        loaded = safetensors.numpy.load_file("model.safetensors")
        assert all((loaded[name] == tensors[name]).all() for name in tensors)
        with safetensors.safe_open("model.safetensors", framework="np") as opened:
            held = opened.get_tensor("layer3")
            # Over the file that is mapped.
            safetensors.numpy.save_file({"other": tensors["layer0"]}, "model.new"); import os
            os.replace("model.new", "model.safetensors")
            assert (opened.get_tensor("layer7") == tensors["layer7"]).all() and (held == tensors["layer3"]).all()
        assert list(safetensors.numpy.load_file("model.safetensors")) == ["other"]

        made = numpy.memmap("array.dat", dtype="int64", mode="w+", shape=(300, 1000))
        made[:] = numpy.arange(300_000).reshape(300, 1000)
        made.flush()
        del made
        changed = numpy.memmap("array.dat", dtype="int64", mode="r+", shape=(300, 1000))
        changed[7, :] = -1
        changed[299, 999] = -2
        changed.flush()
        del changed
        seen = numpy.memmap("array.dat", dtype="int64", mode="r", shape=(300, 1000))
        assert (seen[7] == -1).all() and seen[299, 999] == -2 and seen[8, 0] == 8000
        numpy.save("saved.npy", seen)
        assert (numpy.load("saved.npy", mmap_mode="r") == seen).all()
        numpy.savez_compressed("saved.npz", a=seen[:3])
        opened = numpy.lib.format.open_memmap("opened.npy", mode="w+", dtype="f4", shape=(64, 64))
        opened[:] = 1.5
        del opened
        assert numpy.load("opened.npy").sum() == 64 * 64 * 1.5
        PYTHON
        """,
        # An .npz is a zip with the time in it.
        Rules(volatile=("saved.npz",)),
    ),
    "temporary files": Recipe(
        r"""
        "$PY" -B - <<'PYTHON'
        import os, subprocess, tempfile
        with tempfile.NamedTemporaryFile(dir=".", suffix=".txt") as file:
            file.write(b"for the child\n" * 1000)
            file.flush()
            # The child has no descriptor of it, only the name: it belongs to the family of the writer.
            seen = subprocess.run(["cat", file.name], capture_output=True, check=True).stdout
            assert seen == b"for the child\n" * 1000, len(seen)
            file.write(b"more\n")
            file.flush()
            assert subprocess.run(["tail", "-n1", file.name], capture_output=True, check=True).stdout == b"more\n"
        with tempfile.NamedTemporaryFile(dir=".", delete=False) as file:
            file.write(b"kept\n")
            # As json, yaml and torch checkpoints are often written: renamed while it is still open.
            file.flush()
            os.replace(file.name, "result")
        with tempfile.TemporaryFile(dir=".") as file:
            file.write(b"nameless")
            file.seek(0)
            assert file.read() == b"nameless"
        with tempfile.TemporaryDirectory(dir=".") as directory:
            with open(os.path.join(directory, "x"), "w") as inner:
                inner.write("x")
        assert os.listdir(".") == ["result"], os.listdir(".")
        PYTHON
        """,
    ),
}

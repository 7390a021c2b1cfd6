#!/bin/busybox sh
# The only process of the guest besides the tests: mounts what they need, asks for one binary of
# /etc/suite/plan ("NAME SECONDS ARGUMENTS...") after the other, runs it, and says on the second serial
# port what happened. Lines that start with "@vm " are ours; the others are the test runner's.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup /sys/fs/cgroup
mkdir -p /dev/pts /dev/net /run/lock
# Opening it loads the module, which would make it.
[ -e /dev/net/tun ] || mknod /dev/net/tun c 10 200
mount -t devpts pts /dev/pts
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
ip link set lo up
# Tests count packets: on a busy machine none must be lost on its way to a hook.
echo 100000 >/proc/sys/net/core/netdev_max_backlog
stty -F /dev/ttyS1 raw -echo
exec 3</dev/ttyS1 >/dev/ttyS1
. /etc/suite/environment
echo "@vm boot $(uname -r)"
# The answer: a name, or nothing when there is no more to do.
ask=next
tries=0
while echo "@vm $ask" && read -r wanted <&3 && [ -n "$wanted" ]; do
    while read -r name seconds arguments; do
        [ "$name" != "$wanted" ] || break
    done </etc/suite/plan
    if [ -z "$name" ] && [ "$tries" -lt 3 ]; then
        # On a busy machine the port has lost the first half of a name.
        ask=again
        tries=$((tries + 1))
        continue
    fi
    ask=next
    tries=0
    if [ -z "$name" ]; then
        echo "@vm run $wanted"
        echo "@vm stderr there is no such test binary here"
        echo "@vm end $wanted 127"
        continue
    fi
    echo "@vm run $name"
    # Unquoted on purpose: test names have no spaces.
    timeout -k 5 "$seconds" "/suite/$name" $arguments 2>/tmp/stderr </dev/null 3<&-
    code=$?
    echo
    # What the runner itself or a child said; the tests' own output is in the runner's lines.
    [ "$code" = 0 ] || tail -n 40 /tmp/stderr | sed 's/^/@vm stderr /'
    echo "@vm end $name $code"
done
echo "@vm done"
# Let the port run dry before the power goes.
stty -F /dev/ttyS1 >/dev/null
sleep 0.2
sync
poweroff -f

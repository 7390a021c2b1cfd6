//! Other users: connections that a process of theirs has made, and commands that they run.

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut, Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::{fs::OpenOptionsExt as _, net::UnixStream, process::CommandExt as _},
    },
    path::Path,
    process::{Command, Output, Stdio},
};

use nix::{
    fcntl::{OFlag, open},
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        socket::{
            AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
            UnixAddr, connect, recvmsg, sendmsg, socket, socketpair,
        },
        stat::Mode,
    },
    unistd::{Gid, Uid, setgid, setgroups, setuid},
};
use serde_json::Value;

use crate::{
    child::Child,
    daemon::{LONG, binary},
};

/// A user without a name.
#[derive(Clone, Debug)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    /// Root in a user namespace of their own, as in a container.
    pub contained: bool,
}

impl User {
    /// With a group of the same number.
    pub fn new(uid: u32, groups: &[u32]) -> Self {
        Self {
            uid,
            gid: uid,
            groups: groups.to_vec(),
            contained: false,
        }
    }

    /// Makes the calling process theirs for good. System calls alone.
    fn become_them(&self, groups: &[Gid], map_line: &str) -> nix::Result<()> {
        setgroups(groups)?;
        setgid(Gid::from_raw(self.gid))?;
        setuid(Uid::from_raw(self.uid))?;
        if self.contained {
            // Who has changed users has lost the files of their own in /proc.
            prctl::set_dumpable(true)?;
            unshare(CloneFlags::CLONE_NEWUSER)?;
            let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
            let map = open(c"/proc/self/uid_map", flags, Mode::empty())?;
            nix::unistd::write(&map, map_line.as_bytes())?;
        }
        Ok(())
    }

    fn map_line(&self) -> String {
        format!("0 {} 1", self.uid)
    }

    fn ids(&self) -> Vec<Gid> {
        self.groups.iter().map(|id| Gid::from_raw(*id)).collect()
    }

    /// A connection that a process of theirs has made.
    pub fn connect(&self, path: &Path) -> io::Result<UnixStream> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (mine, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let (ids, map) = (self.ids(), self.map_line());
        let address = UnixAddr::new(path).unwrap();
        let child = Child::new(|_| {
            self.become_them(&ids, &map)?;
            let stream = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
            connect(stream.as_raw_fd(), &address)?;
            let files = [stream.as_raw_fd()];
            let control = [ControlMessage::ScmRights(&files)];
            let parts = [IoSlice::new(b".")];
            sendmsg::<()>(
                theirs.as_raw_fd(),
                &parts,
                &control,
                MsgFlags::empty(),
                None,
            )?;
            Ok(())
        });
        child.end()?;
        let mut word = [0; 1];
        let mut parts = [IoSliceMut::new(&mut word)];
        let mut space = nix::cmsg_space!(RawFd);
        let got = recvmsg::<()>(
            mine.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        let file = got.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::ScmRights(files) => files.first().copied(),
            _ => None,
        });
        // SAFETY: the kernel has just made it for this process.
        let file = unsafe { OwnedFd::from_raw_fd(file.unwrap()) };
        Ok(file.into())
    }

    /// A request on a connection of its own.
    pub fn ask(&self, path: &Path, request: &str) -> io::Result<(u16, Value)> {
        Ok(converse(self.connect(path)?, request))
    }

    /// Runs the binary under test as them, wherever it lies.
    pub fn enforcer(&self, arguments: &[&str]) -> Output {
        let program = File::options()
            .read(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(binary())
            .unwrap();
        let (this, ids, map) = (self.clone(), self.ids(), self.map_line());
        let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
        command
            .args(arguments)
            .stdin(Stdio::null())
            .env_remove("ENFORCER_SOCKET");
        // SAFETY: between fork and exec only system calls.
        unsafe {
            command.pre_exec(move || Ok(this.become_them(&ids, &map)?));
        }
        command.output().unwrap()
    }
}

/// `GET /v1/status` and the like: the status code and the answer.
pub fn converse(mut stream: UnixStream, request: &str) -> (u16, Value) {
    stream.set_read_timeout(Some(LONG)).unwrap();
    let (request, body) = request.split_once('\n').unwrap_or((request, ""));
    let text = format!(
        "{request} HTTP/1.1\r\nHost: enforcer\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    // What is too long is refused before it is all there: the answer says so.
    let _ = stream.write_all(text.as_bytes());
    answer(&mut stream)
}

/// What is answered, up to the end of the connection.
pub fn answer(stream: &mut UnixStream) -> (u16, Value) {
    let mut bytes = Vec::new();
    // A connection that was closed with something unread ends with an error behind the answer.
    let end = stream.read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no answer but {text:?} ({end:?})"));
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    (code, serde_json::from_str(body).unwrap_or(Value::Null))
}

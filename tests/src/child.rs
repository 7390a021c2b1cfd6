//! A child process of a test, for what belongs to processes: cgroups, ids, files passed on.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

use nix::{
    sys::{
        prctl,
        socket::{
            AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
            recvmsg, sendmsg, socketpair,
        },
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork},
};

/// Name of a child's one thread.
pub const NAME: &str = "enft-child";

/// A child, and the line to it.
pub struct Child {
    pub pid: Pid,
    line: OwnedFd,
}

/// The child's end of the line.
pub struct Line(OwnedFd);

impl Line {
    /// Waits for a word of the parent's, or its end, and the file that may come with it.
    pub fn wait(&self) -> Option<OwnedFd> {
        let mut word = [0; 1];
        let mut parts = [IoSliceMut::new(&mut word)];
        let mut space = nix::cmsg_space!(RawFd);
        let fd = self.0.as_raw_fd();
        let message = recvmsg::<()>(fd, &mut parts, Some(&mut space), MsgFlags::empty()).ok()?;
        let mut files = message.cmsgs().ok()?.filter_map(|control| match control {
            ControlMessageOwned::ScmRights(files) => files.first().copied(),
            _ => None,
        });
        // SAFETY: the kernel has just made it for this process.
        files.next().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Says a word to the parent.
    pub fn say(&self) {
        let _ = nix::unistd::write(&self.0, b".");
    }
}

impl Child {
    /// Forks the calling thread, whose network namespace the child keeps. `work` should be system
    /// calls and little else: other threads may have held locks. It returns what
    /// [`Child::end`] does.
    pub fn new(work: impl FnOnce(&Line) -> nix::Result<()>) -> Self {
        let (mine, yours) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        // SAFETY: the child goes no further than `work`, as its comment demands.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => Self {
                pid: child,
                line: mine,
            },
            ForkResult::Child => {
                drop(mine);
                let _ = prctl::set_name(c"enft-child");
                let code = match work(&Line(yours)) {
                    Ok(()) => 0,
                    Err(errno) => errno as i32,
                };
                // SAFETY: ends the process at once.
                unsafe { libc::_exit(code) }
            }
        }
    }

    /// Waits for a word of the child's.
    pub fn wait(&self) {
        let mut word = [0; 1];
        assert_eq!(
            nix::unistd::read(&self.line, &mut word),
            Ok(1),
            "the child ended"
        );
    }

    /// Says a word, with a file if there is one.
    pub fn say(&self, file: Option<&OwnedFd>) {
        let files: Vec<RawFd> = file.iter().map(|file| file.as_raw_fd()).collect();
        let control: Vec<ControlMessage<'_>> = if files.is_empty() {
            Vec::new()
        } else {
            vec![ControlMessage::ScmRights(&files)]
        };
        let parts = [IoSlice::new(b".")];
        let fd = self.line.as_raw_fd();
        sendmsg::<()>(fd, &parts, &control, MsgFlags::empty(), None).unwrap();
    }

    /// Waits for its end: what `work` said.
    pub fn end(self) -> nix::Result<()> {
        match waitpid(self.pid, None).unwrap() {
            WaitStatus::Exited(_, 0) => Ok(()),
            WaitStatus::Exited(_, code) => Err(nix::errno::Errno::from_raw(code)),
            other => panic!("{other:?}"),
        }
    }
}

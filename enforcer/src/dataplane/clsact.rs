//! Attaching before tcx (Linux 6.6): a filter of the `clsact` queueing discipline.

use std::{io::ErrorKind, thread, time::Duration};

use aya::programs::{
    ProgramError, SchedClassifier, TcAttachType, TcError,
    tc::{self, NlOptions, SchedClassifierLinkId, TcAttachOptions},
};

use super::{
    DataplaneError,
    errors::{attach_error, has_errno, is_already_there},
};

/// How often to try where the discipline goes away between our two calls, and how long apart.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(20);

/// Attaches `program` first in its direction of the interface; what the kernel said of the last
/// attempt.
pub(super) fn attach(
    program: &mut SchedClassifier,
    name: &'static str,
    direction: TcAttachType,
    interface: &str,
) -> Result<Result<SchedClassifierLinkId, ProgramError>, DataplaneError> {
    let mut attempt = 1;
    loop {
        match tc::qdisc_add_clsact(interface) {
            Ok(()) => {}
            Err(error) if is_already_there(&error) => {}
            Err(error) => return Err(attach_error(name, interface, &error)),
        }
        detach_old(name, direction, interface);
        let options = TcAttachOptions::Netlink(NlOptions {
            priority: 1,
            ..NlOptions::default()
        });
        match program.attach_with_options(interface, direction, options) {
            Err(error) if attempt < ATTEMPTS && is_without_parent(&error) => {
                tracing::warn!(
                    interface,
                    hook = name,
                    attempt,
                    error = super::errors::chain(&error),
                    "the clsact discipline was gone before the program was attached: again"
                );
            }
            attached => return Ok(attached),
        }
        thread::sleep(PAUSE);
        attempt += 1;
    }
}

/// Unlike links, filters outlive who made them: those of a daemon that was killed would go on
/// judging by its policy, beside ours and after us.
fn detach_old(name: &'static str, direction: TcAttachType, interface: &str) {
    match tc::qdisc_detach_program(interface, direction, name) {
        Ok(()) => {}
        Err(TcError::IoError(error)) if error.kind() == ErrorKind::NotFound => {}
        // Where others have filters there, their names may not be readable: no reason not to
        // enforce. An old filter of ours then judges as well, which only denies more.
        Err(error) => {
            tracing::warn!(
                interface,
                hook = name,
                %error,
                "cannot look for programs that an earlier run left"
            );
        }
    }
}

/// Whether the discipline that a filter hangs from is not there: `EINVAL` with "Parent Qdisc
/// doesn't exists" (`__tcf_qdisc_find` in `net/sched/cls_api.c`). Others may remove it between
/// our two calls. On a 6.1 that had run for half an hour it was refused right after it had been made,
/// and trying again did not help: see docs/limits.md.
fn is_without_parent(error: &ProgramError) -> bool {
    has_errno(error, libc::EINVAL) || has_errno(error, libc::ENOENT)
}

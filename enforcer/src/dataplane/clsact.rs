//! Attaching before tcx (Linux 6.6): a filter of the `clsact` queueing discipline.

use std::{thread, time::Duration};

use aya::programs::{
    ProgramError, SchedClassifier, TcAttachType,
    links::Link as _,
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};

use super::{
    DataplaneError,
    errors::{attach_error, has_errno, is_already_there},
};

/// How often to try where the discipline goes away between our two calls, and how long apart.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(20);

/// First of all filters.
const PRIORITY: u16 = 1;
/// Ours, so that the next daemon finds it and puts another program in its place: no number that the
/// kernel gives, nor one that somebody takes who counts from 1.
const HANDLE: TcHandle = TcHandle::new(0, 0xe4f0);

/// Attaches `program` first in its direction of the interface, in the place of an earlier one if
/// there is one: in one step, so that no packet passes in between.
pub(super) fn attach(
    program: &mut SchedClassifier,
    name: &'static str,
    direction: TcAttachType,
    interface: &str,
) -> Result<(), DataplaneError> {
    let failed = |error: &dyn std::error::Error| attach_error(name, interface, error);
    let mut attempt = 1;
    loop {
        match tc::qdisc_add_clsact(interface) {
            Ok(()) => {}
            Err(error) if is_already_there(&error) => {}
            Err(error) => return Err(attach_error(name, interface, &error)),
        }
        let options = TcAttachOptions::Netlink(NlOptions {
            priority: PRIORITY,
            handle: HANDLE,
            ..NlOptions::default()
        });
        let attached = match old(direction, interface).map(|old| program.attach_to_link(old)) {
            Ok(Ok(link)) => Ok(link),
            Ok(Err(_)) | Err(_) => program.attach_with_options(interface, direction, options),
        };
        match attached {
            Err(error) if attempt < ATTEMPTS && is_without_parent(&error) => {
                tracing::warn!(
                    interface,
                    hook = name,
                    attempt,
                    error = super::errors::chain(&error),
                    "the clsact discipline was gone before the program was attached: again"
                );
            }
            attached => {
                let id = attached.map_err(|error| failed(&error))?;
                // What aya drops it takes off.
                std::mem::forget(program.take_link(id).map_err(|error| failed(&error))?);
                return Ok(());
            }
        }
        thread::sleep(PAUSE);
        attempt += 1;
    }
}

/// Takes the program in this place off, if one is there.
pub(super) fn detach(
    name: &'static str,
    direction: TcAttachType,
    interface: &str,
) -> Result<(), DataplaneError> {
    let Ok(old) = old(direction, interface) else {
        return Ok(()); // The interface is gone.
    };
    match old.detach() {
        Err(error)
            if ![libc::ENODEV, libc::ENOENT, libc::EINVAL]
                .iter()
                .any(|errno| has_errno(&error, *errno)) =>
        {
            Err(attach_error(name, interface, &error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Puts `program` in the place of ours; `false` when nothing is there.
pub(super) fn replace(
    program: &mut SchedClassifier,
    direction: TcAttachType,
    interface: &str,
) -> bool {
    let Ok(old) = old(direction, interface) else {
        return true; // There is no interface to be without it.
    };
    let Ok(id) = program.attach_to_link(old) else {
        return false;
    };
    if let Ok(link) = program.take_link(id) {
        std::mem::forget(link);
    }
    true
}

/// Where an earlier program of ours would be.
fn old(direction: TcAttachType, interface: &str) -> std::io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(interface, direction, PRIORITY, HANDLE, None)
}

/// Whether the discipline that a filter hangs from is not there: `EINVAL` with "Parent Qdisc
/// doesn't exists" (`__tcf_qdisc_find` in `net/sched/cls_api.c`). Others may remove it between
/// our two calls. On a 6.1 that had run for half an hour it was refused right after it had been made,
/// and trying again did not help: see docs/limits.md.
fn is_without_parent(error: &ProgramError) -> bool {
    has_errno(error, libc::EINVAL) || has_errno(error, libc::ENOENT)
}

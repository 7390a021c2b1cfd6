//! What the kernel says about interfaces and the programs on them.

use aya::programs::{SchedClassifier, TcAttachType};

use super::{
    DataplaneError,
    errors::{has_errno, io_error, syscall},
};

/// The name of an interface now.
pub(super) fn interface_name(ifindex: u32) -> Option<String> {
    let name = nix::net::if_::if_indextoname(ifindex).ok()?;
    // nix 0.31 takes the null pointer of a failure for an empty name.
    name.into_string().ok().filter(|name| !name.is_empty())
}

/// Programs on an interface's two tcx hooks, in the order in which they are asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hanging {
    /// Hook, id and name of each.
    pub programs: Vec<(&'static str, u32, String)>,
}

/// What hangs on an interface. Linux 6.6 and later; needs CAP_SYS_ADMIN for the names.
///
/// # Errors
/// [`DataplaneError::Syscall`].
pub fn hanging(interface: &str) -> Result<Hanging, DataplaneError> {
    let mut programs = Vec::new();
    for (hook, direction) in [
        ("tc_ingress", TcAttachType::Ingress),
        ("tc_egress", TcAttachType::Egress),
    ] {
        match SchedClassifier::query_tcx(interface, direction) {
            Ok((_, found)) => programs.extend(found.iter().map(|program| {
                let name = program.name_as_str().unwrap_or_default().to_owned();
                (hook, program.id(), name)
            })),
            // The kernel's word for none at all.
            Err(error) if has_errno(&error, libc::ENOENT) => {}
            Err(error) => {
                return Err(syscall("query the programs of a link")(io_error(&error)));
            }
        }
    }
    Ok(Hanging { programs })
}

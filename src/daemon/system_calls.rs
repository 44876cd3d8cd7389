//! Which system calls a process that serves a mount does without, as a seccomp filter for all of its threads. What is refused
//! answers `EPERM`: a library that only tries goes on.
//!
//! A list of what is refused, not of what is allowed: an allocator, a resolver or a runtime may need another call tomorrow,
//! and a filesystem must not stop for that.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Looking into other processes, or letting them look into this one.
const OTHER_PROCESSES: &[c_long] = &[
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kcmp,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
];
/// Changing what is mounted where. Another process does that (`mount/attendant`).
const MOUNTS: &[c_long] = &[
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_open_by_handle_at,
];
/// What `clone` may not make: a process in namespaces of its own.
const NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];
/// The machine's kernel and clock.
const MACHINE: &[c_long] = &[
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    #[cfg(not(target_arch = "riscv64"))]
    libc::SYS_kexec_file_load,
    libc::SYS_bpf,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_syslog,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_personality,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];
/// The kernel's keyrings, which are not where our keys are, and io_uring, which no filter sees into.
const UNUSED: &[c_long] = &[
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_vhangup,
];
/// Starting programs.
const PROGRAMS: &[c_long] = &[libc::SYS_execve, libc::SYS_execveat];
/// The part of a socket's type that says its kind; the rest are flags.
const SOCKET_KIND: u64 = 0xf;
/// Calls of the x32 kind have this bit and the numbers of the others.
#[cfg(target_arch = "x86_64")]
const X32: c_long = 0x4000_0000;

/// What is left out of the filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Needs {
    /// Sockets other than those on this machine.
    pub(super) network: bool,
    /// Sockets on this machine: with one, the services that listen on it are within reach.
    pub(super) local_sockets: bool,
    /// To start programs.
    pub(super) programs: bool,
}

/// Refuses from now on, and for good, what this process does without; all threads of it, and what they start. No program that
/// is started gains privileges.
///
/// # Errors
/// The kernel has no seccomp filters, or this is an architecture without ours.
pub(super) fn refuse(needs: Needs) -> Result<(), Error> {
    seccompiler::apply_filter_all_threads(&without_clone3()?)?;
    seccompiler::apply_filter_all_threads(&program(needs)?)
}

/// What `clone3` is to make lies in memory, where no filter looks. A C library that is told that there is none uses `clone`.
fn without_clone3() -> Result<BpfProgram, Error> {
    let mut rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_clone3 | X32, Vec::new());
    let missing = rustix::io::Errno::NOSYS.raw_os_error().unsigned_abs();
    let architecture = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(missing), architecture)?.try_into()?)
}

fn program(needs: Needs) -> Result<BpfProgram, Error> {
    let lists = [OTHER_PROCESSES, MOUNTS, MACHINE, UNUSED, if needs.programs { &[] } else { PROGRAMS }];
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        lists.concat().into_iter().map(|call| (call, Vec::new())).collect();
    rules.insert(libc::SYS_socket, other_families(needs)?);
    if !needs.local_sockets {
        // Of a pair, these alone can be connected to somebody else.
        let kinds = [libc::SOCK_DGRAM, libc::SOCK_RAW].map(|kind| u64::from(kind.unsigned_abs()));
        let pairs = kinds.into_iter().map(|kind| word(1, SeccompCmpOp::MaskedEq(SOCKET_KIND), kind));
        rules.insert(libc::SYS_socketpair, pairs.collect::<Result<_, _>>()?);
    }
    let made = NAMESPACES.map(|flag| u64::from(flag.unsigned_abs()));
    let made = made.into_iter().map(|flag| word(0, SeccompCmpOp::MaskedEq(flag), flag));
    rules.insert(libc::SYS_clone, made.collect::<Result<_, _>>()?);
    rules.insert(libc::SYS_ioctl, vec![word(1, SeccompCmpOp::Eq, libc::TIOCSTI)?]);
    rules.insert(libc::SYS_prctl, vec![word(0, SeccompCmpOp::Eq, libc::PR_SET_DUMPABLE.unsigned_abs().into())?]);
    #[cfg(target_arch = "x86_64")]
    for (call, refused) in rules.clone() {
        rules.insert(call | X32, refused);
    }
    let architecture = std::env::consts::ARCH.try_into()?;
    let refused = SeccompAction::Errno(refusal());
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, refused, architecture)?.try_into()?)
}

/// What a refused call answers.
fn refusal() -> u32 {
    rustix::io::Errno::PERM.raw_os_error().unsigned_abs()
}

/// All families of sockets but those that are needed.
fn other_families(needs: Needs) -> Result<Vec<SeccompRule>, Error> {
    // Netlink tells a resolver which addresses this machine has.
    let far = [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
    let near = [libc::AF_UNIX].into_iter().filter(|_| needs.local_sockets);
    let needed: Vec<_> = near.chain(far.into_iter().filter(|_| needs.network)).collect();
    if needed.is_empty() {
        // A call without rules is refused whatever its arguments are.
        return Ok(Vec::new());
    }
    let others = needed.into_iter().map(|family| condition(0, SeccompCmpOp::Ne, family.unsigned_abs().into()));
    Ok(vec![SeccompRule::new(others.collect::<Result<_, _>>()?)?])
}

fn word(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, Error> {
    Ok(SeccompRule::new(vec![condition(argument, operator, value)?])?)
}

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompCondition, Error> {
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_compiles_whatever_is_needed() {
        for bits in 0..8 {
            let [network, programs, local_sockets] = [1, 2, 4].map(|bit| bits & bit != 0);
            let length = program(Needs { network, programs, local_sockets }).unwrap().len();
            assert!(length > 50 && length < 4096, "{length} instructions");
        }
    }
}

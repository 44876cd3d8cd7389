//! The command line program: parse, run, exit code.

use std::alloc::System;
use std::process::ExitCode;

use zeroizing_alloc::ZeroAlloc;

/// Wipes memory when it is freed: SDK, JSON and TLS buffers that held a key, and what ciphers expand
/// keys to, leave no copy behind.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<System> = ZeroAlloc(System);

fn main() -> ExitCode {
    kmsfs::cli::main()
}

//! Measures the limits of the machine: no stage of a transfer can be faster.

use crate::report::Table;
use crate::{Bench, GIB, MIB};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use pageferry_tests::Victim;
use pageferry_tests::criu::free_address;
use pageferry_tests::program::Program;
use std::env;
use std::error::Error;
use std::fs::File;
use std::hint::black_box;
use std::io::{IoSliceMut, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

const BUFFER: usize = 4 * MIB as usize;

/// Measures the limits, in MB/s, in a separate process: a program inherits the peak memory of the process that
/// starts it as its own initial value.
pub(crate) fn measure() -> Result<Table, Box<dyn Error>> {
    let own = env::current_exe()?;
    let out = Command::new(own)
        .arg(ALONE)
        .stderr(Stdio::inherit())
        .output()?;
    if !out.status.success() {
        return Err(format!("limits: {}", out.status).into());
    }
    Ok(serde_json::from_slice(&out.stdout)?)
}

/// Argument that selects this measurement.
pub(crate) const ALONE: &str = "limits-alone";

/// Measures the limits in this process, and prints them as JSON.
pub(crate) fn alone(bench: &Bench) -> Result<(), Box<dyn Error>> {
    println!("{}", serde_json::to_string(&here(bench))?);
    Ok(())
}

fn here(bench: &Bench) -> Table {
    let columns = ["stage", "MB/s"];
    let mut table = Table::new("limits", "What each stage alone can do", &columns);
    let mut victim = Victim::start("heap=1024");
    let region = victim.regions().into_iter().max_by_key(|it| it.length);
    let region = region.expect("it has some");
    let source = vec![1_u8; GIB as usize];
    let mut buffer = vec![0_u8; BUFFER];
    for _ in 0..bench.runs {
        let rate = rate(GIB, || {
            for part in source.chunks_exact(BUFFER) {
                buffer.copy_from_slice(black_box(part));
                black_box(&buffer);
            }
        });
        table.add("memcpy into a 4 MiB buffer", &[rate]);
        let pid = Pid::from_raw(victim.pid());
        let whole = region.length / BUFFER as u64;
        let rate = self::rate(whole * BUFFER as u64, || {
            for part in 0..whole {
                let base = (region.start + part * BUFFER as u64) as usize;
                let (len, local) = (BUFFER, IoSliceMut::new(&mut buffer));
                let read = process_vm_readv(pid, &mut [local], &[RemoteIoVec { base, len }]);
                assert_eq!(read, Ok(len));
            }
        });
        table.add("process_vm_readv", &[rate]);
        table.add("TCP over loopback (iperf3)", &[iperf()]);
        for place in &bench.places {
            let row = format!("write and fsync, {}", place.name);
            let _ballast = place.ballast(GIB);
            table.add(&row, &[write(&place.dir, &source)]);
        }
    }
    table
}

fn rate(bytes: u64, work: impl FnOnce()) -> f64 {
    let began = Instant::now();
    work();
    bytes as f64 / 1e6 / began.elapsed().as_secs_f64()
}

fn iperf() -> f64 {
    let port = free_address().port().to_string();
    let mut server = Command::new("iperf3");
    let mut server =
        Program::start(server.args(["-s", "-1", "--forceflush", "-p", &port, "-i", "0"]));
    pageferry_tests::criu::await_listener("/proc/net/tcp6", port.parse().expect("it is one"));
    let mut client = Command::new("iperf3");
    let client = client.args(["-c", "127.0.0.1", "-p", &port, "-t", "2", "-J"]);
    let client = Program::start(client).finish();
    server.kill();
    let report: serde_json::Value =
        serde_json::from_str(&client.stdout).expect("iperf3 prints JSON");
    let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
    rate.unwrap_or_else(|| panic!("{}", client.stdout)) / 8e6
}

fn write(dir: &Path, bytes: &[u8]) -> f64 {
    let dir = tempfile::tempdir_in(dir).expect("there can be one");
    let mut file = File::create(dir.path().join("pages")).expect("it is ours");
    rate(bytes.len() as u64, || {
        for part in bytes.chunks(BUFFER) {
            file.write_all(part).expect("there is room");
        }
        file.sync_all().expect("it is a file");
    })
}

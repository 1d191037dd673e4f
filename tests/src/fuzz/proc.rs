//! Text from `/proc`. Names in it may contain any bytes.

use super::Input;
use pageferry_common::PageRange;
use pageferry_common::proc::stat::Stat;
use pageferry_common::proc::{maps, status};
use pageferry_sender::freeze::procs::is_vfork;
use pageferry_sender::target::descriptors::does_direct_io;
use pageferry_sender::target::files::executable;
use pageferry_sender::target::process::children_faults_in;
use pageferry_sender::target::smaps::program_for;
use pageferry_sender::target::vma::{self, Class, KernelMounts};
use std::cell::LazyCell;

thread_local! {
    static MOUNTS: LazyCell<KernelMounts> = const {
        LazyCell::new(|| KernelMounts::probe().expect("the kernel has memfds"))
    };
}

/// The first byte selects a parser; the rest is a whole file, or a name in one.
pub fn proc(input: &[u8]) {
    let mut input = Input(input);
    let what = input.byte();
    let bytes = input.0;
    let text = String::from_utf8_lossy(bytes);
    match what % 8 {
        0 => whole_maps(bytes),
        1 => file_in_maps(bytes),
        2 => name_in_stat(bytes),
        3 => {
            let _ = children_faults_in(bytes, bytes);
            let _ = status::nested_pids(bytes);
            let value = status::field(bytes, "TracerPid");
            assert!(value.is_none_or(|value| !value.contains(&b'\n')));
        }
        4 => name_in_status(bytes),
        5 => {
            let _ = Stat::parse(bytes).map(|stat| (stat.state(), stat.start_time()));
            let _ = is_vfork(&text);
        }
        6 => drop(does_direct_io(&text)),
        _ => drop(program_for(bytes)),
    }
}

fn whole_maps(bytes: &[u8]) {
    let vdso = maps::vdso(bytes);
    for line in maps::lines(bytes) {
        if let Some(path) = executable(line) {
            assert!(path.starts_with('/'));
        }
    }
    let Ok(vmas) = MOUNTS.with(|mounts| vma::parse(bytes, mounts)) else {
        return;
    };
    if let Some(vdso) = vdso {
        let of_vdso = |vma: &vma::Vma| vma.range == vdso && vma.class == Class::Whole;
        assert!(vmas.iter().any(of_vdso));
    }
}

/// The name of a file does not change the kind of its mapping.
fn file_in_maps(name: &[u8]) {
    // The kernel escapes line ends.
    let name: Vec<u8> = name.iter().copied().filter(|&byte| byte != b'\n').collect();
    let line = [
        b"1000-3000 r-xp 00002000 fe:01 77                 /tmp/",
        &name[..],
        b"\n5000-6000 r-xp 00000000 00:00 0 [vdso]\n",
    ];
    let text = line.concat();
    let vmas = MOUNTS.with(|mounts| vma::parse(&text, mounts));
    let [file, vdso] = &vmas.expect("it is as the kernel writes it")[..] else {
        panic!("these are two mappings");
    };
    assert_eq!(file.class, Class::Private { hugetlb: false });
    assert!(file.file_code && file.inode == 77 && file.offset == 0x2000);
    assert_eq!(vdso.class, Class::Whole);
    assert_eq!(maps::vdso(&text), PageRange::from_bounds(0x5000, 0x6000));
}

/// The name of a process does not change its other fields.
fn name_in_stat(name: &[u8]) {
    let numbers: Vec<String> = (0..50).map(|number: u64| number.to_string()).collect();
    let after_name = format!(") T {}\n", numbers.join(" "));
    let content = [b"9 (", name, after_name.as_bytes()].concat();
    let stat = Stat::parse(&content).expect("it is as the kernel writes it");
    assert_eq!(stat.state(), 'T');
    assert_eq!(stat.start_time(), Some(18));
    let status = b"SigIgn:\t0000000000000000\n";
    // The 9th and the 11th field after the name; the state is the 0th.
    let faults = children_faults_in(status, &content);
    assert_eq!(faults.expect("all is there"), Some(7 + 9));
}

/// The name of a process does not change its other fields; the kernel escapes line ends in it.
fn name_in_status(name: &[u8]) {
    let name: Vec<u8> = name.iter().copied().filter(|&byte| byte != b'\n').collect();
    let rest = b"\nNStgid:\t70\t7\nSigIgn:\t0000000000010000\n";
    let status = [b"Name:\t", &name[..], rest].concat();
    assert_eq!(status::nested_pids(&status), [70, 7]);
    assert_eq!(status::field(&status, "NStgid"), Some(&b"70\t7"[..]));
    assert_eq!(
        children_faults_in(&status, b"").expect("it ignores them"),
        None
    );
}

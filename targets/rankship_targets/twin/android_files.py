"""The files of a Pixel 6 that a session reads; their values are made up and mean nothing."""

PROPERTIES = {
    "ro.product.model": "Pixel 6",
    "ro.product.name": "oriole",
    "ro.product.device": "oriole",
    "ro.product.manufacturer": "Google",
    "ro.product.brand": "google",
    "ro.product.cpu.abi": "arm64-v8a",
    "ro.product.cpu.abilist": "arm64-v8a,armeabi-v7a,armeabi",
    "ro.build.fingerprint": "google/oriole/oriole:13/RANKSHIP.STAND.IN/1:user/test-keys",
    "ro.build.version.sdk": "33",
    "ro.build.version.release": "13",
    "ro.build.type": "user",
    "ro.soc.model": "Tensor",
    "ro.soc.manufacturer": "Google",
    "ro.hardware": "oriole",
    "ro.board.platform": "gs101",
    "ro.debuggable": "0",
    "ro.serialno": "RANKSHIPTWIN",
    "sys.boot_completed": "1",
}

_GETPROP = """#!/system/bin/sh
if [ $# = 0 ]; then
  while IFS='=' read -r key value; do echo "[$key]: [$value]"; done < /system/build.prop
else
  while IFS='=' read -r key value; do
    [ "$key" = "$1" ] && { echo "$value"; exit 0; }
  done < /system/build.prop
  echo "$2"
fi
"""
_DUMPSYS = """#!/system/bin/sh
case $1 in
  battery | thermalservice) cat "/condition/dumpsys/$1" ;;
  *) echo "Can't find service: $1" >&2; exit 1 ;;
esac
"""
# Below /: part of the system, which is read-only on the device.
SYSTEM_FILES = {
    "system/build.prop": "".join(f"{key}={value}\n" for key, value in PROPERTIES.items()),
    "system/etc/passwd": "root::0:0:root:/:/system/bin/sh\nshell::2000:2000::/:/system/bin/sh\n",
    "system/etc/group": "root::0:\nshell::2000:\n",
    "system/bin/getprop": _GETPROP,
    "system/bin/dumpsys": _DUMPSYS,
}

# Two Cortex-X1, two Cortex-A76 and four Cortex-A55 of a Tensor: (part, highest frequency), by processor.
_CORES = [("0xd05", 1_803_000)] * 4 + [("0xd0b", 2_253_000)] * 2 + [("0xd44", 2_802_000)] * 2
_CPUINFO = """processor\t: {number}
BogoMIPS\t: 49.15
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: {part}
CPU revision\t: 0

"""
_BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  level: 87
  scale: 100
  voltage: 4251
  temperature: 278
  technology: Li-ion
"""
_THERMAL = """IsStatusOverride: false
Thermal Status: 0
Current temperatures from HAL:
\tTemperature{mValue=41.2, mType=0, mName=BIG, mStatus=0}
"""


def list_condition_files() -> dict[str, str]:
    """Return the files of the device's condition, path → text; a test may change them while the device runs."""
    files = {
        "proc/cpuinfo": "".join(_CPUINFO.format(number=number, part=part) for number, (part, _) in enumerate(_CORES)),
        "sys/class/thermal/thermal_zone0/type": "BIG\n",
        "sys/class/thermal/thermal_zone0/temp": "41200\n",
        "dumpsys/battery": _BATTERY,
        "dumpsys/thermalservice": _THERMAL,
    }
    processors = "sys/devices/system/cpu"
    files |= {f"{processors}/{name}": "0-7\n" for name in ("online", "possible", "present")}
    for number, (_, khz) in enumerate(_CORES):
        folder = f"{processors}/cpu{number}/cpufreq"
        files |= {
            f"{folder}/{name}": f"{khz}\n" for name in ("scaling_cur_freq", "scaling_max_freq", "cpuinfo_max_freq")
        }
        files |= {f"{folder}/scaling_min_freq": "300000\n", f"{folder}/scaling_governor": "sched_pixel\n"}
    return files
